"""The tables of docs/results.md out of an evaluation's `evaluation.json`, as Markdown.

python benchmarks/evidence/table.py RUN/evaluation.json [--of NAME ...]

`--of`: the methods whose differences with every other one are shown; the baseline's always are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from influence.evaluations.downstream_results import (
    Contrast,
    Downstream,
    Estimate,
    Result,
    both_ways,
)


def loss_table(results: dict[str, Result], contrasts: Sequence[Contrast], baseline: str) -> str:
    """One line a method: losses, what they are less than the baseline's, and what they cost."""
    against = {each.of: each for each in contrasts if each.against == baseline}
    lines = [
        f"| method | loss (s.e.) | of each seed | perplexity | less {baseline} (95 %) "
        "| selecting, TFLOP | s | training, s |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for name, each in results.items():
        seeds = " / ".join(f"{loss:.3f}" for loss in each.by_seed) if each.training else "–"
        perplexity = f"{each.perplexity.mean:.2f}" if each.perplexity else "–"
        cost = each.selection
        selecting = f"{cost.flops / 1e12:,.1f} | {cost.seconds:,.0f}" if cost else "– | –"
        training = f"{each.training.seconds:,.0f}" if each.training else "–"
        lines.append(
            f"| {name} | {_estimate(each.loss)} | {seeds} | {perplexity} "
            f"| {_contrast(against.get(name))} | {selecting} | {training} |"
        )
    return "\n".join(lines)


def contrast_table(contrasts: Sequence[Contrast], of: Sequence[str]) -> str:
    """The differences of some methods with the others, the baseline left out."""
    lines = ["| less | " + " | ".join(of) + " |", "|---|" + "---|" * len(of)]
    known = both_ways(contrasts)
    against = dict.fromkeys(each.against for each in contrasts)
    against |= dict.fromkeys(each.of for each in contrasts)
    for name in against:
        cells = [_contrast(known.get((one, name))) for one in of]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _estimate(each: Estimate) -> str:
    return f"{each.mean:.3f}" + ("" if each.error is None else f" ({each.error:.3f})")


def _contrast(each: Contrast | None) -> str:
    return "–" if each is None else f"{each.value:+.3f} ({each.low:+.3f} to {each.high:+.3f})"


def main() -> None:
    """Write the tables to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--of", nargs="*", default=[])
    asked = parser.parse_args()
    found = Downstream.model_validate(json.loads(asked.evaluation.read_text())["downstream"])
    parts = dict(found.targets) | ({} if found.overall is None else {"both": found.overall})
    for name, target in parts.items():
        print(f"\n**{name}** ({target.rows} rows)\n")
        print(loss_table(target.results, target.contrasts, found.about.baseline))
        if asked.of:
            print("\n" + contrast_table(target.contrasts, asked.of))
        if target.judge is not None:
            between = target.judge.selections
            print(
                f"\nStandard deviation between seeds {target.judge.seeds:.3f}, between selections "
                + ("not above it." if between is None else f"{between:.3f}.")
            )


if __name__ == "__main__":
    main()
