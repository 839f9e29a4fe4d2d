"""Paired comparison of trained models: losses by seed and test row, resampled over both.

Losses are a row's mean response loss in nats per token; lower is better. Two selections that were
trained with the same seeds and tested on the same rows are compared row by row and seed by seed,
so that what makes a row hard, or a seed lucky for both, does not count.

Test rows are drawn with replacement. Seeds are too few for that: of three, one resample in nine has
a single one, and the percentile interval holds the truth three times in four. Theirs are the draws
under which the mean of normal seeds has Student's t distribution about what was found, for three
seeds with two degrees of freedom; for many seeds that is the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

DRAWS = 10_000
LEVEL = 0.95
# Resampling weights held at once: 2^21 float64 are 16 MiB.
_BLOCK_ENTRIES = 1 << 21

Losses = Mapping[str, Float[np.ndarray, "seeds rows"]]
"""One selection's losses by test name; every test has the same seeds."""


@dataclass(frozen=True)
class Difference:
    """Mean of a - b over seeds and rows, its interval, and how it compares with seed noise.

    Attributes:
        value: negative means that a's loss is lower.
        low: lower end of the percentile interval of the draws; NaN for one seed, which does not
            tell how much another one would change.
        high: its upper end.
        seed_sd: standard deviation over seeds of the difference (of one seed), NaN for one seed.
        seeds: that both were trained with.
    """

    value: float
    low: float
    high: float
    seed_sd: float
    seeds: int

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def error(self) -> float:
        """Standard error over the seeds, NaN for one."""
        return self.seed_sd / math.sqrt(self.seeds)

    def seeds_until(self, times: float) -> float:
        """Seeds after which |value| is so many times its standard error; infinite for no value."""
        return (times * self.seed_sd / self.value) ** 2 if self.value else math.inf


def resampled_means(
    values: Sequence[Float[np.ndarray, "k seeds rows"]], *, draws: int = DRAWS, seed: int = 0
) -> Float[np.ndarray, "k draws"]:
    """Draws of the means of k selections, the same weights of seeds and rows for all of them.

    One draw weights the seeds once for all test sets (`values` has an array for each) and resamples
    the rows of each test set on their own, and takes the mean over tests of the mean over seeds and
    rows. The difference of two rows of the result is a draw of the paired difference (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8, for the rows).
    """
    generator = np.random.default_rng(seed)
    count, seeds = values[0].shape[:2]
    widest = max(seeds, *(each.shape[2] for each in values))
    block = max(1, _BLOCK_ENTRIES // widest)
    total = np.zeros((count, draws))
    for first in range(0, draws, block):
        size = min(block, draws - first)
        of_seeds = _seed_weights(generator, seeds, size)
        for each in values:
            of_rows = _row_weights(generator, each.shape[2], size)
            found = np.einsum("bs,ksr,br->kb", of_seeds, each, of_rows, optimize=True)
            total[:, first : first + size] += found
    return total / len(values)


def _row_weights(
    generator: np.random.Generator, count: int, draws: int
) -> Float[np.ndarray, "draws count"]:
    """How often each of `count` is drawn in `count` draws, over `count`."""
    return generator.multinomial(count, np.full(count, 1 / count), size=draws) / count


def _seed_weights(
    generator: np.random.Generator, count: int, draws: int
) -> Float[np.ndarray, "draws count"]:
    """Weights of sum 1 with which a mean m of values with standard deviation s (of count - 1) is
    m + t s / sqrt(count), t Student's with count - 1 degrees of freedom.

    A centred Gaussian direction g makes a weighted sum normal with the values' squared deviations,
    (count - 1) s^2, as its variance; over chi / sqrt(count - 1), common to all, it is a t.
    """
    if count == 1:
        return np.ones((draws, 1))
    g = generator.standard_normal((draws, count))
    g -= g.mean(axis=1, keepdims=True)
    chi = np.sqrt(generator.chisquare(count - 1, (draws, 1)))
    return 1 / count + g / chi / np.sqrt(count)


def paired_bootstrap(
    differences: Sequence[Float[np.ndarray, "seeds rows"]], *, draws: int, seed: int
) -> Float[np.ndarray, " draws"]:
    """Draws of a mean difference: `resampled_means` of losses of a minus those of b."""
    return resampled_means([each[None] for each in differences], draws=draws, seed=seed)[0]


def interval(sample: Float[np.ndarray, " draws"], level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of draws.

    A draw that is NaN may be anything: it counts at either end, and an end among such is infinite.
    """
    unknown = np.isnan(sample)
    if unknown.any():
        below, above = np.where(unknown, -np.inf, sample), np.where(unknown, np.inf, sample)
        ends = ((below, (1 - level) / 2), (above, (1 + level) / 2))
        low, high = (np.quantile(each, q, method="nearest") for each, q in ends)
        return float(low), float(high)
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(a: Losses, b: Losses, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Compare two selections over the same tests, seeds and rows."""
    values = [a[name] - b[name] for name in a]
    return compared(seed_means(values), paired_bootstrap(values, draws=draws, seed=seed))


def compared(
    by_seed: Float[np.ndarray, " seeds"], sample: Float[np.ndarray, " draws"]
) -> Difference:
    """The comparison out of each seed's mean difference and the draws of the mean."""
    if len(by_seed) == 1:
        return Difference(float(by_seed[0]), math.nan, math.nan, math.nan, 1)
    low, high = interval(sample)
    sd = float(by_seed.std(ddof=1))
    return Difference(float(by_seed.mean()), low, high, sd, len(by_seed))


def seed_means(
    values: Sequence[Float[np.ndarray, "*k seeds rows"]],
) -> Float[np.ndarray, "*k seeds"]:
    """Mean over tests of the mean over each one's rows."""
    return np.mean([each.mean(axis=-1) for each in values], axis=0)


def gain_share(
    untrained: Float[np.ndarray, " draws"],
    own: Float[np.ndarray, " draws"],
    full: Float[np.ndarray, " draws"],
) -> Float[np.ndarray, " draws"]:
    """(untrained - own) / (untrained - full): the part of the full pool's gain that is kept.

    NaN where the full pool gains nothing: the ratio then says nothing of the selection.
    """
    gain = np.asarray(untrained - full, dtype=np.float64)
    part = np.full(gain.shape, np.nan)
    return np.divide(untrained - own, gain, out=part, where=gain > 0)


def variance_ratio(means: Float[np.ndarray, "selections seeds"]) -> tuple[float, float]:
    """(variance between seeds of one selection, variance between selections), one-way ANOVA.

    The first is the mean within-selection variance W; the second is the variance of the
    selections' means less W / seeds, which seed noise alone puts there; it can be negative.
    """
    within = float(means.var(axis=1, ddof=1).mean())
    between = float(means.mean(axis=1).var(ddof=1)) - within / means.shape[1]
    return within, between


def pareto_front(
    cost: Float[np.ndarray, " k"], loss: Float[np.ndarray, " k"]
) -> Bool[np.ndarray, " k"]:
    """Which of k choices are not beaten: none costs no more and loses no more, and less of one."""
    cheaper = cost[:, None] <= cost[None]
    better = loss[:, None] <= loss[None]
    strictly = (cost[:, None] < cost[None]) | (loss[:, None] < loss[None])
    return np.logical_not(np.asarray((cheaper & better & strictly).any(axis=0)))
