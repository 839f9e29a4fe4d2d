"""Statistics of `worth.py`: losses per selection and seed, and paired differences.

Losses are means over test rows of a row's mean response loss, in nats per token; lower is better.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from influence.errors import InputError

DRAWS = 10_000
LEVEL = 0.95
BASELINE = "random"
UNTRAINED = "none"
OVERALL = "mean of the tests"

Losses = Mapping[str, Float[np.ndarray, "seeds rows"]]
"""One selection's losses by test name; every test has the same seeds."""


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over seeds and rows, its interval, and how it compares with seed noise.

    Attributes:
        value: negative means that a's loss is lower.
        low: lower end of the percentile interval of the bootstrap.
        high: its upper end.
        seed_sd: standard deviation over seeds of the difference (of one seed), NaN for one seed.
        seeds_needed: seeds after which |value| is twice its standard error over seeds.
    """

    value: float
    low: float
    high: float
    seed_sd: float
    seeds_needed: float


def paired_bootstrap(
    differences: Sequence[Float[np.ndarray, "seeds rows"]], *, draws: int, seed: int
) -> Float[np.ndarray, " draws"]:
    """Bootstrap draws of the mean difference, resampling seeds and rows, each with replacement.

    `differences`: per test set the losses of a minus those of b, by seed and test row, so that
    the pairing is kept. One draw resamples the seeds once for all test sets and the rows of each
    test set on their own, and takes the mean over tests of the mean over seeds and rows.
    """
    generator = np.random.default_rng(seed)
    seeds = len(differences[0])
    chance = np.full(seeds, 1 / seeds)
    seed_weights = generator.multinomial(seeds, chance, size=draws) / seeds
    total = np.zeros(draws)
    for values in differences:
        rows = values.shape[1]
        row_weights = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws) / rows
        total += np.einsum("bs,sr,br->b", seed_weights, values, row_weights, optimize=True)
    return total / len(differences)


def difference(a: Losses, b: Losses, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Compare two selections over the same tests, seeds and rows."""
    values = [a[name] - b[name] for name in a]
    sample = paired_bootstrap(values, draws=draws, seed=seed)
    low, high = np.quantile(sample, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    by_seed = np.mean([each.mean(axis=1) for each in values], axis=0)
    mean = float(by_seed.mean())
    sd = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else float("nan")
    needed = (2 * sd / mean) ** 2 if mean else float("inf")
    return Difference(mean, float(low), float(high), sd, needed)


def variance_ratio(means: Float[np.ndarray, "selections seeds"]) -> tuple[float, float]:
    """(variance between seeds of one selection, variance between selections), one-way ANOVA.

    The first is the mean within-selection variance W; the second is the variance of the
    selections' means less W / seeds, which seed noise alone puts there; it can be negative.
    """
    within = float(means.var(axis=1, ddof=1).mean())
    between = float(means.mean(axis=1).var(ddof=1)) - within / means.shape[1]
    return within, between


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
        f"Differences: a minus b, negative if a is better; {LEVEL:.0%} percentile interval of a "
        f"paired bootstrap over seeds and test rows ({DRAWS:,} draws). With S seeds the bootstrap "
        "sees only (S - 1)/S of the variance between seeds. `seed sd` is that of one seed's "
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
        sure = found.low > 0 or found.high < 0
        value = f"**{found.value:+.4f}**" if sure else f"{found.value:+.4f}"
        noise = "| |"
        if np.isfinite(found.seed_sd):
            noise = f"| {found.seed_sd:.4f} | {found.seeds_needed:.1f}"
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
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
