"""The tables of `in2core_experiment.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common import write_json
from scipy.stats import spearmanr
from worth_report import difference_table, read_results

TEST, TARGET, FULL, COVERAGE = "test", "target", "full", "cover"
PREDICTORS = ("mass", "effective", "proponents", "nearest", "nearest_mean")
ORDER = ("none", "full", "best", "random", "worst")
#: Parts of all layers' bytes at which the table has a line for every rule.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)

Results = Mapping[str, Mapping[int, Any]]


def markdown(out: Path, document: str | None) -> str:
    """All tables; with `document`, what they are made of is written there as JSON."""
    results = read_results(str(out / "results"))
    layers = _optional(out / "layers.json")
    covered = {
        seed: found["rows"]
        for seed in sorted(results.get(FULL, {}))
        if (found := _optional(out / f"{COVERAGE}{seed}" / "coverage.json")) is not None
    }
    if document is not None:
        coverage = [{"seed": seed, "rows": rows} for seed, rows in covered.items()]
        everything = {"results": _plain(results), "layers": layers, "coverage": coverage}
        write_json(Path(document), everything)
    parts = [loss_table(results), difference_table(results, [TEST])]
    if layers is not None:
        parts.append(layer_lines(layers))
    if covered:
        parts.append(coverage_table(results, covered))
    return "\n\n".join(parts)


def coverage_table(results: Results, covered: Mapping[int, Any]) -> str:
    """Spearman, over target rows, of what is known before with the loss after the full pool."""
    before = np.array(results["none"][0]["tests"][TARGET]["losses"])
    lines = [
        f"| Spearman over {len(before)} target rows with | loss after: mean (s.e.) | by seed "
        "| fall of the loss: mean (s.e.) | by seed |",
        "|---|" + "---:|" * 4,
    ]
    known: dict[str, dict[int, np.ndarray]] = {"loss before": dict.fromkeys(covered, before)}
    for name in PREDICTORS:
        known[name] = {
            seed: np.array([row[name] for row in rows], dtype=np.float64)
            for seed, rows in covered.items()
        }
    for name, by_seed in known.items():
        cells = []
        for falls in (False, True):
            found = []
            for seed, values in by_seed.items():
                after = np.array(results[FULL][seed]["tests"][TARGET]["losses"])
                found.append(float(spearmanr(values, before - after if falls else after)[0]))  # type: ignore[arg-type]
            mean, error = _mean(found, 3)
            cells += [f"{mean} ({error})", ", ".join(f"{value:.3f}" for value in found)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _optional(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _plain(results: Results) -> list[Any]:
    return [each for seeds in results.values() for _seed, each in sorted(seeds.items())]


def loss_table(results: Results) -> str:
    """Held-out loss by seed, its mean and standard error, and the perplexity."""
    seeds = sorted({seed for each in results.values() for seed in each})
    columns = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| trained on | rows | {columns} | mean loss | s.e. | perplexity | s.e. |",
        "|---|" + "---:|" * (len(seeds) + 5),
    ]
    for name in (n for n in ORDER if n in results):
        found = results[name]
        losses = {seed: float(np.mean(r["tests"][TEST]["losses"])) for seed, r in found.items()}
        perplexities = [perplexity(result) for result in found.values()]
        rows = [r["train"]["rows"] for r in found.values() if r["train"] is not None]
        cells = [f"{losses[seed]:.4f}" if seed in losses else "" for seed in seeds]
        count = "/".join(str(n) for n in dict.fromkeys(rows)) or "0"
        mean, error = _mean(list(losses.values()), 4)
        ppl, ppl_error = _mean(perplexities, 3)
        line = " | ".join([name, count, *cells, mean, error, ppl, ppl_error])
        lines.append(f"| {line} |")
    return "\n".join(lines)


def perplexity(result: Any) -> float:
    """Of the mean over all response tokens of the test rows."""
    test = result["tests"][TEST]
    return math.exp(np.average(test["losses"], weights=test["response_tokens"]))


def _mean(values: list[float], digits: int) -> tuple[str, str]:
    error = ""
    if len(values) > 1:
        error = f"{np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"
    return f"{np.mean(values):.{digits}f}", error


def layer_lines(choice: Any) -> str:
    """Number of layers, bytes, and Spearman with all layers, by rule and share of the bytes."""
    full = choice["full_row_bytes"]
    lines = [
        f"{choice['pilot']} rows, {choice['groups']} layers, {full:,} bytes a row; Spearman with "
        "the ranking by all layers on the rows that a subset was chosen on, and on the others",
        "",
        "| chosen by | layers | bytes a row | of all | Spearman | other rows |",
        "|---|" + "---:|" * 5,
    ]
    by_rule: dict[str, list[Any]] = {}
    for subset in choice["table"]:
        by_rule.setdefault(subset["rule"], []).append(subset)
    for rule, subsets in by_rule.items():
        shown = []
        for share in SHARES:
            fitting = [s for s in subsets if s["row_bytes"] <= share * full]
            if fitting and fitting[-1] not in shown:
                shown.append(fitting[-1])
        for s in shown:
            part = s["row_bytes"] / full
            figures = f"{part:.1%} | {s['spearman']:.3f} | {s['held_out']:.3f}"
            lines.append(f"| {rule} | {s['groups']} | {s['row_bytes']:,} | {figures} |")
    return "\n".join(lines)
