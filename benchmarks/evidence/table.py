"""The tables of docs/results.md out of an evaluation's `evaluation.json`, as Markdown.

python benchmarks/evidence/table.py RUN/evaluation.json... [--of NAME] [--page docs/results.md]

Of several files, evaluations with the same judge in several runs, the later ones give what the
first lacks. `--of`: the method whose differences with every other one are shown. `--page`: put the
tables into a page, between its lines `<!-- downstream NAME -->` and `<!-- end -->`, instead of
printing them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

from influence.evaluations.downstream_results import (
    Contrast,
    Downstream,
    Estimate,
    TargetResult,
    both_ways,
)

DIFFERENCES = "differences"
TITLES = {
    "id": "**Influence Distillation, certified**",
    "id_mean": "Influence Distillation by the mean",
    "id_uniform": "300 uniform landmarks, no rounds",
    "exact": "exact scores of all rows (first order)",
    "id_plain": "exact, gradients not normalised",
    "id_warm": "exact, after a warm-up",
    "id_adam": "exact, Adam after a warm-up",
    "id_second_order": "second order (centred Fisher, eta 1e-3), exact, by the mean",
    "rds": "RDS+",
    "rds_mean": "RDS+ by the mean",
    "less": "LESS",
    "in2core": "In2Core",
    "semantic": "semantic (sentence encoder)",
    "full": "the whole pool",
}


def read(path: Path) -> Downstream:
    """The downstream part of an evaluation.json."""
    return Downstream.model_validate(json.loads(path.read_text())["downstream"])


def joined(first: Downstream, other: Downstream) -> Downstream:
    """The first with the selections, and their differences, that only the other has.

    What is said of a selection beside others (`gain`, `front`) stays as its own evaluation has it.

    Raises:
        ValueError: they are not judged alike: another recipe, or another loss of what both have.
    """
    if first.about != other.about:
        raise ValueError(f"not one judge: {first.about} and {other.about}")
    groups = {name: (each, other.targets[name]) for name, each in first.targets.items()}
    made = {name: _joined(name, *each) for name, each in groups.items()}
    overall = first.overall
    if overall is not None and other.overall is not None:
        overall = _joined("both", overall, other.overall)
    return first.model_copy(update={"targets": made, "overall": overall})


def _joined(group: str, first: TargetResult, other: TargetResult) -> TargetResult:
    for name in first.results.keys() & other.results.keys():
        losses = first.results[name].by_seed, other.results[name].by_seed
        if losses[0] != losses[1]:
            raise ValueError(f"{group}: {name} has losses {losses[0]} and {losses[1]}")
    known = both_ways(first.contrasts)
    new = [each for each in other.contrasts if (each.of, each.against) not in known]
    results = {**other.results, **first.results}
    return first.model_copy(update={"results": results, "contrasts": first.contrasts + new})


def tables(found: Downstream, of: str) -> dict[str, str]:
    """By name: a table for each target, and the differences of one method with the others."""
    groups = dict(found.targets) | ({} if found.overall is None else {"both": found.overall})
    baseline = found.about.baseline
    made = {name: loss_table(each, baseline) for name, each in found.targets.items()}
    return {**made, DIFFERENCES: contrast_table(groups, of)}


def loss_table(target: TargetResult, baseline: str) -> str:
    """One line a method: losses, what they are less than the baseline's, and what they cost."""
    against = {each.of: each for each in target.contrasts if each.against == baseline}
    lines = [
        f"| method | loss (s.e.) | of each seed | perplexity | less {baseline} (95 %) "
        "| selecting, TFLOP | s | training, TFLOP |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for name, each in target.results.items():
        seeds = " / ".join(f"{loss:.3f}" for loss in each.by_seed) if each.training else "–"
        perplexity = f"{each.perplexity.mean:.2f}" if each.perplexity else "–"
        cost = each.selection
        selecting = f"{cost.flops / 1e12:,.1f} | {cost.seconds:,.0f}" if cost else "– | –"
        training = f"{each.training.flops / 1e12:,.1f}" if each.training else "–"
        lines.append(
            f"| {TITLES.get(name, name)} | {_estimate(each.loss)} | {seeds} | {perplexity} "
            f"| {_contrast(against.get(name))} | {selecting} | {training} |"
        )
    return "\n".join(lines)


def contrast_table(groups: Mapping[str, TargetResult], of: str) -> str:
    """A line for every other method, a column for every target and for all of them together."""
    lines = ["| | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    known = {name: both_ways(each.contrasts) for name, each in groups.items()}
    for other in next(iter(groups.values())).results:
        cells = [_contrast(known[name].get((of, other))) for name in groups]
        if set(cells) != {"–"}:
            lines.append(f"| {TITLES.get(other, other)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judge_line(name: str, target: TargetResult) -> str:
    """Whether the judge can tell."""
    if target.judge is None:
        return f"{name}: one seed"
    between = target.judge.selections
    shown = "not above it" if between is None else f"{between:.3f}"
    return (
        f"{name}: {target.rows} rows; standard deviation between seeds {target.judge.seeds:.3f}, "
        f"between selections {shown}"
    )


def _estimate(each: Estimate) -> str:
    return f"{each.mean:.3f}" + ("" if each.error is None else f" ({each.error:.3f})")


def _contrast(each: Contrast | None) -> str:
    if each is None:
        return "–"
    if each.low is None or each.high is None:  # one seed
        return f"{each.value:+.3f}"
    return f"{each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})"


def filled_page(page: str, found: Mapping[str, str]) -> str:
    """A page with the tables between their lines.

    Raises:
        ValueError: a table that the page has no place for.
    """
    for name, table in found.items():
        begin, end = f"<!-- downstream {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?\n{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page has no line {begin!r} followed by a line {end!r}")
        page = pattern.sub(lambda _, text=f"{begin}\n\n{table}\n\n{end}": text, page)
    return page


def main() -> None:
    """Write the tables to standard output, or into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--of", default="id")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    found = reduce(joined, map(read, asked.evaluations))
    made = tables(found, asked.of)
    if asked.page is not None:
        asked.page.write_text(filled_page(asked.page.read_text(), made))
        made = {}
    for name, table in made.items():
        print(f"\n**{name}**\n\n{table}")
    for name, target in found.targets.items():
        print(judge_line(name, target))


if __name__ == "__main__":
    main()
