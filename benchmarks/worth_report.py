"""Statistics of `worth.py`: losses per selection and seed, and paired differences.

Losses are means over test rows of a row's mean response loss, in nats per token; lower is better.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from influence.errors import InputError
from influence.paired import DRAWS, LEVEL, difference, variance_ratio

BASELINE = "random"
UNTRAINED = "none"
OVERALL = "mean of the tests"


def read_results(out: str) -> dict[str, dict[int, dict[str, Any]]]:
    """{selection: {seed: result}} of a folder; InputError if there is none, or rows differ."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    tests: Any = None
    for path in sorted(Path(out).glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = result["settings"]["tests"]
        if tests is not None and rows != tests:
            raise InputError(f"{path}: tested on other rows than the results before it")
        tests = rows
        found.setdefault(result["selection"], {})[result["seed"]] = result
    if not found:
        raise InputError(f"--out {out}: no results (NAME-seedN.json) yet; run without --report")
    return found


def losses_of(results: Mapping[int, Any], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """{test: losses (seeds x rows)}; the untrained model's one result stands for every seed."""
    picked = [results[0] if set(results) == {0} else results[seed] for seed in seeds]
    names = picked[0]["tests"]
    return {name: np.array([each["tests"][name]["losses"] for each in picked]) for name in names}


def markdown(results: Mapping[str, Mapping[int, Any]]) -> str:
    """The whole report: a table of losses and a table of differences for each test and overall."""
    first = next(iter(next(iter(results.values())).values()))
    tests = list(first["tests"])
    parts = [training_table(results)]
    for test in [*tests, OVERALL] if len(tests) > 1 else tests:
        names = tests if test == OVERALL else [test]
        parts += [f"### {test}", loss_table(results, names), difference_table(results, names)]
        parts.append(judge_line(results, names))
    parts.append(
        f"Differences: a minus b, negative if a is better; {LEVEL:.0%} interval, test rows "
        f"resampled in pairs, seeds by Student's t ({DRAWS:,} draws). `seed sd`: of one seed's "
        "difference; `seeds needed`: until the difference is twice its standard error over seeds."
    )
    return "\n\n".join(part for part in parts if part)


def ordered(results: Mapping[str, Any]) -> list[str]:
    """Untrained first, then random, then the others by name."""
    front = [name for name in (UNTRAINED, BASELINE) if name in results]
    return front + sorted(set(results) - set(front))


def training_table(results: Mapping[str, Mapping[int, Any]]) -> str:
    """Rows, steps, tokens a run and speed of each selection."""
    lines = [
        "| selection | seeds | rows | dropped | truncated | steps | tokens "
        "| train loss, last epoch | train tokens/s |"
    ]
    lines.append("|---|" + "---:|" * 8)
    for name in ordered(results):
        trained = [r["train"] for r in results[name].values() if r["train"] is not None]
        if not trained:
            continue

        def mean(key: str, trained: Sequence[Any] = trained) -> float:
            return float(np.mean([each[key] for each in trained]))

        last = np.mean([each["epoch_losses"][-1] for each in trained])
        speed = sum(t["tokens"] for t in trained) / sum(t["seconds"] for t in trained)
        lines.append(
            f"| {name} | {len(trained)} | {mean('rows'):.0f} | {mean('dropped'):.1f} "
            f"| {mean('truncated'):.1f} | {mean('steps'):.0f} | {mean('tokens'):.0f} "
            f"| {last:.3f} | {speed:.0f} |"
        )
    return "\n".join(lines)


def loss_table(results: Mapping[str, Mapping[int, Any]], tests: Sequence[str]) -> str:
    """Mean test loss of every selection and seed, the mean over seeds, its standard error."""
    seeds = sorted({seed for each in results.values() for seed in each})
    header = "".join(f" seed {seed} |" for seed in seeds)
    lines = [
        f"| selection |{header} mean | s.e. over seeds |",
        "|---|" + "---:|" * (len(seeds) + 2),
    ]
    for name in ordered(results):
        means = {seed: mean_loss(results[name][seed], tests) for seed in sorted(results[name])}
        cells = "".join(f" {means[seed]:.4f} |" if seed in means else " |" for seed in seeds)
        values = np.array(list(means.values()))
        error = f"{values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        lines.append(f"| {name} |{cells} {values.mean():.4f} | {error} |")
    return "\n".join(lines)


def mean_loss(result: Mapping[str, Any], tests: Sequence[str]) -> float:
    """Mean over tests of the mean over rows."""
    return float(np.mean([np.mean(result["tests"][test]["losses"]) for test in tests]))


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """What to compare: everything with the baseline, then the selections with each other."""
    chosen = [name for name in names if name not in (BASELINE, UNTRAINED)]
    against = [(name, BASELINE) for name in [*chosen, UNTRAINED] if name in names]
    return (against if BASELINE in names else []) + list(combinations(chosen, 2))


def difference_table(results: Mapping[str, Mapping[int, Any]], tests: Sequence[str]) -> str:
    """Paired differences over the seeds that both have."""
    lines = [
        "| a | b | seeds | a - b | interval | seed sd | seeds needed |",
        "|---|---|" + "---:|" * 5,
    ]
    for a, b in pairs(ordered(results)):
        seeds = sorted(set(results[b]) & (set(results[b]) if a == UNTRAINED else set(results[a])))
        if not seeds:
            continue
        left, right = losses_of(results[a], seeds), losses_of(results[b], seeds)
        found = difference({t: left[t] for t in tests}, {t: right[t] for t in tests})
        value = f"**{found.value:+.4f}**" if found.sure else f"{found.value:+.4f}"
        interval, noise = "", "| |"  # of one seed
        if np.isfinite(found.seed_sd):
            interval = f"{found.low:+.4f} to {found.high:+.4f}"
            noise = f"| {found.seed_sd:.4f} | {found.seeds_until(2):.1f}"
        lines.append(f"| {a} | {b} | {len(seeds)} | {value} | {interval} {noise} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def judge_line(results: Mapping[str, Mapping[int, Any]], tests: Sequence[str]) -> str:
    """Can the judge tell selections apart: variance between seeds against between selections."""
    names = [name for name in ordered(results) if name != UNTRAINED]
    seeds = sorted(set.intersection(*(set(results[name]) for name in names))) if names else []
    if len(names) < 2 or len(seeds) < 2:
        return "Can the judge tell? That takes two selections with two seeds in common."
    means = np.array([[mean_loss(results[n][s], tests) for s in seeds] for n in names])
    within, between = variance_ratio(means)
    ratio = f"{within / between:.2f}" if between > 0 else "no selection stands out from the noise"
    return (
        f"Can the judge tell? {len(names)} selections, {len(seeds)} seeds: sd between seeds "
        f"{within**0.5:.4f}, variance between selections {between:.2e}, "
        f"ratio seeds / selections: {ratio}."
    )
