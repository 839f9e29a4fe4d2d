"""Scores held against retraining: the linear datamodeling score, and leaving rows out.

A score is good if it says what training on a row does. Park et al. (TRAK, arXiv 2303.14186, section
2.2) ask it of groups: over random subsets of a pool, rank the sum of the subset's scores against
the output of a model trained on the subset; here the output is minus a test loss. Leave-one-out
asks it of single rows. Pure functions of plain arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

DRAWS = 2000
LEVEL = 0.95
#: Of fewer observations a resample knows too little: its interval held the truth as seldom as in 67
#: of 100 simulations of 4, and of a perfect ranking it is a point.
FEWEST = 6
# Resampled values held at once: 2^21 float64 are 16 MiB.
_BLOCK_ENTRIES = 1 << 21


@dataclass(frozen=True)
class Agreement:
    """A rank correlation and its 95 % interval; None where a side is constant. Less than FEWEST
    observations have no interval."""

    value: float | None
    low: float | None
    high: float | None


def draw_subsets(rows: int, subsets: int, fraction: float, seed: int) -> Bool[np.ndarray, "s n"]:
    """Random subsets of the same size: round(fraction n) rows each, one at least, without
    replacement."""
    generator = np.random.default_rng([seed, 0x1D5])
    size = max(1, round(fraction * rows))
    chosen = np.zeros((subsets, rows), dtype=bool)
    for each in chosen:
        each[generator.permutation(rows)[:size]] = True
    return chosen


def subset_sums(
    scores: Float[np.ndarray, "n c"], subsets: Bool[np.ndarray, "s n"]
) -> Float[np.ndarray, "s c"]:
    """What the scores say of every subset: the sum over its rows.

    Without what rounding leaves of them (1e-12 of the largest sum of absolute scores): sums that
    are equal would be ranked by the order of their terms.
    """
    chosen, scores = subsets.astype(np.float64), np.asarray(scores, dtype=np.float64)
    grain = 1e-12 * (chosen @ np.abs(scores)).max(axis=0)
    grain[grain == 0] = 1.0
    return np.round(chosen @ scores / grain) * grain


def rank_correlations(
    a: Float[np.ndarray, "s c"], b: Float[np.ndarray, "s c"]
) -> Float[np.ndarray, " c"]:
    """Spearman's correlation of every column of a with that of b; NaN where one is constant."""
    return _correlations(rankdata(a, axis=0), rankdata(b, axis=0), axis=0)


def datamodeling_score(
    scores: Float[np.ndarray, "n c"],
    subsets: Bool[np.ndarray, "s n"],
    losses: Float[np.ndarray, "s c"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """The linear datamodeling score: the mean over the columns of Spearman's correlation, over the
    subsets, of the sums of their scores with minus their losses (TRAK, section 2.2).

    Columns are test rows, or one column for the mean of a test. The interval is the percentile
    interval of the bootstrap over subsets, the same resample for all columns; the test rows are
    taken as they are.

    Args:
        scores: of every row of the pool; higher is better.
        losses: of the models that were trained on the subsets.
    """
    return agreement(subset_sums(scores, subsets), -np.asarray(losses), draws=draws, seed=seed)


def agreement(
    a: Float[np.ndarray, "s c"],
    b: Float[np.ndarray, "s c"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """Mean over the columns of `rank_correlations`, and its bootstrap interval over the rows.

    A column in which a or b is constant says nothing and is left out; so is a draw of the bootstrap
    for a column that is constant in it.
    """
    values = rank_correlations(a, b)
    usable = np.flatnonzero(np.isfinite(values))
    if not len(usable):
        return Agreement(None, None, None)
    if len(a) < FEWEST:
        return Agreement(float(values[usable].mean()), None, None)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(a), size=(draws, len(a)))
    sample = _resampled(a[:, usable], b[:, usable], drawn)
    sample = sample[np.isfinite(sample)]
    if not len(sample):
        return Agreement(float(values[usable].mean()), None, None)
    low, high = np.quantile(sample, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Agreement(float(values[usable].mean()), float(low), float(high))


def _resampled(
    a: Float[np.ndarray, "s c"], b: Float[np.ndarray, "s c"], drawn: Int[np.ndarray, "d s"]
) -> Float[np.ndarray, " d"]:
    """The mean correlation of every resample of the rows."""
    found = np.full(len(drawn), np.nan)
    block = max(1, _BLOCK_ENTRIES // a.size)
    for first in range(0, len(drawn), block):
        rows = drawn[first : first + block]
        of_each = _correlations(rankdata(a[rows], axis=1), rankdata(b[rows], axis=1), axis=1)
        usable = np.isfinite(of_each)
        count = usable.sum(axis=1)
        total = np.where(usable, of_each, 0.0).sum(axis=1)
        found[first : first + block] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return found


def _correlations(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Pearson's correlations along an axis; NaN where a side is constant."""
    a = a - a.mean(axis=axis, keepdims=True)
    b = b - b.mean(axis=axis, keepdims=True)
    size = np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, (a * b).sum(axis=axis) / size, np.nan)


def reliability(values: Float[np.ndarray, "seeds s"]) -> float | None:
    """How well the mean over the seeds ranks as another mean over as many seeds would.

    The mean Spearman correlation r of pairs of seeds, for k seeds by Spearman and Brown:
    k r / (1 + (k - 1) r); 0 where r is not positive. No score can be expected to correlate with the
    truth better than by its root. None for one seed, or where a seed's values are constant.
    """
    seeds = len(values)
    if seeds < 2:
        return None
    one, other = np.triu_indices(seeds, 1)
    pairs = rank_correlations(values[one].T, values[other].T)
    if not np.isfinite(pairs).all():
        return None
    r = float(pairs.mean())
    return seeds * r / (1 + (seeds - 1) * r) if r > 0 else 0.0


def changes(
    without: Float[np.ndarray, "seeds k t"], full: Float[np.ndarray, "seeds t"]
) -> Float[np.ndarray, "seeds k"]:
    """How much the mean test loss rises, seed by seed, when each of k rows is left out: above 0
    where the row helps. Test rows without a loss (NaN) are left out."""
    return np.nanmean(without - full[:, None], axis=2)


def left_out_weights(rows: int, place: int) -> Float[np.ndarray, " n"]:
    """Weights with which a training is one without a row, everything else being the same.

    The row stays in its place with a weight of nothing (1e-12), so that the others meet in the same
    steps, in the same order, as with it: without, the noise of another order would be many times
    what one row does.
    """
    weights = np.ones(rows)
    weights[place] = 1e-12
    return weights


def filled(scores: Float[np.ndarray, "n c"]) -> tuple[Float[np.ndarray, "n c"], int]:
    """Scores with the column's mean for rows that have none, and how many those are.

    Raises:
        ValueError: not one row has a score.
    """
    missing = ~np.isfinite(scores)
    if missing.all(axis=0).any():
        raise ValueError("not one row has a score")
    means = np.nanmean(np.where(missing, np.nan, scores), axis=0)
    return np.where(missing, means, scores), int(missing.any(axis=1).sum())


def mean_rank(scores: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """The mean over the columns of each row's rank by score; NaN for a row without a score."""
    ranks = rankdata(scores, axis=0, nan_policy="omit").mean(axis=1)
    return np.where(np.isfinite(scores).all(axis=1), ranks, np.nan)


def group_sizes(rows: int, each: int, at_random: int) -> tuple[int, int]:
    """Rows from either end, and random ones, of so many rows: half of them are random at most, and
    a third of the others at either end."""
    at_random = min(at_random, rows // 2)
    return min(each, (rows - at_random) // 3), at_random


def extremes(
    scores: Float[np.ndarray, " n"], each: int, at_random: int, seed: int
) -> dict[str, Int[np.ndarray, " k"]]:
    """Random rows, whatever their scores are, and `each` rows from the top and from the bottom of
    the others; fewer of few rows (`group_sizes`).

    Ties go by position; rows without a score (NaN) are at neither end.
    """
    each, at_random = group_sizes(len(scores), each, at_random)
    drawn = np.sort(np.random.default_rng([seed, 0x100]).permutation(len(scores))[:at_random])
    others = np.setdiff1d(np.flatnonzero(np.isfinite(scores)), drawn)
    each = min(each, len(others) // 3)
    ranked = others[np.argsort(-scores[others], kind="stable")]
    return {"top": ranked[:each], "bottom": ranked[len(ranked) - each :], "random": drawn}
