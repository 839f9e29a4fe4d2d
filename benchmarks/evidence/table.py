"""The tables of docs/results.md out of an evaluation's `evaluation.json`, as Markdown.

python benchmarks/evidence/table.py RUN/evaluation.json [--of NAME] [--page docs/results.md]

`--of`: the method whose differences with every other one are shown. `--page`: put the tables into a
page, between its lines `<!-- downstream NAME -->` and `<!-- end -->`, instead of printing them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
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
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--of", default="id")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    found = Downstream.model_validate(json.loads(asked.evaluation.read_text())["downstream"])
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
