"""A programme over a large pool, solved on the rows that can have weight, and proved for all.

Only rows with a positive reduced gain c_i - f_i'z - tau have weight. The programme is solved on a
working set of the largest gains; then one pass over the pool takes every row's gain at the solution
found. Where no row outside has a positive reduced gain, the KKT conditions of the whole pool hold:
that pass is the proof. Otherwise the rows that would enter join the working set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from influence.dual_newton import Point, descend, solve_rows, threshold
from influence.lambda_search import equal_weights, search
from influence.weights import ranked
from influence.working_set import FactorRows

MARGIN_ROWS = 1000
FEWEST_NEW_ROWS = 64
SAMPLE_BUDGET = 400
SMALLEST_SAMPLE = 20_000
LEAST_STRIDE = 4


@dataclass(frozen=True)
class Verified:
    """A point that is optimal on the whole pool without `left_out`.

    chosen: pool positions of the working set, which the point's positions refer to.
    gains: c - F z of every row at the point, -inf for those of no part in the problem.
    """

    point: Point
    chosen: Int[np.ndarray, " w"]
    gains: Float[np.ndarray, " n"]
    left_out: Int[np.ndarray, " t"]
    attainable: bool

    @classmethod
    def of_all(cls, point: Point, rows: FactorRows) -> Verified:
        """A point on all rows of the pool."""
        everyone, none = np.arange(len(rows)), np.zeros(0, dtype=np.int64)
        return cls(point, everyone, rows.gains(point.image), none, True)


def first_order(
    rows: FactorRows, ranks: Int[np.ndarray, " n"], budget: int, total: float
) -> Verified:
    """The closed form without curvature: tau is the largest gain of the rows left unselected.

    Rows that tie with the last selected one are left out, as with curvature.
    """
    order = ranked(rows.c, ranks, budget + 1)
    best = order[:budget]
    # `ranked` holds all rows that tie with the (k+1)-th: a tie at the cut is in it as a whole.
    rest = order[budget:]
    left = rest[rows.c[rest] == rows.c[best[-1]]]
    others = np.ones(len(rows), dtype=bool)
    others[best] = others[left] = False
    everyone, gains = np.arange(len(rows)), _without(rows.c, left)
    if not others.any():
        point = equal_weights(rows.only(best), total)
        return Verified(point, best, gains, left, True)
    tau = float(rows.c[others].max())
    excess = rows.c[best] - tau
    lam = float(excess.sum()) / total
    point = Point(best, excess / lam, tau, np.zeros(rows.rank), lam, 0)
    return Verified(point, everyone, gains, left, True)


def solve_pool(
    rows: FactorRows, z: Float[np.ndarray, " r"], *, lam: float, total: float, tolerance: float
) -> Verified:
    """The solution for one lambda from the start z."""
    gains, cold = rows.gains(z), not z.any()
    chosen, steps = np.zeros(0, dtype=np.int64), 0
    tau = threshold(gains, lam * total)
    wanted = 2 * int(np.count_nonzero(gains > tau)) + 4 * rows.rank + MARGIN_ROWS
    while True:
        chosen = np.sort(_grown(chosen, gains, tau, wanted))
        subset = rows if len(chosen) == len(rows) else rows.only(chosen)
        z, cold = (descend(subset, z, lam=lam, total=total) if cold else z), False
        point = solve_rows(subset, z, lam=lam, total=total, tolerance=tolerance / 4)
        z, tau, wanted = point.image, point.tau, 0
        steps += point.steps
        gains = rows.gains(z)
        if not _would_enter(gains, chosen, tau):
            none = np.zeros(0, dtype=np.int64)
            return Verified(replace(point, steps=steps), chosen, gains, none, True)


def search_pool(
    rows: FactorRows,
    ranks: Int[np.ndarray, " n"],
    z: Float[np.ndarray, " r"] | None,
    budget: int,
    total: float,
) -> Verified:
    """The solution for a budget below the number of rows, from z or from a sample of the pool."""
    z = _sampled_start(rows, ranks, budget, total) if z is None else z
    gains = rows.gains(z)
    chosen = np.zeros(0, dtype=np.int64)
    tau, steps = math.inf, 0
    wanted = 2 * budget + 4 * rows.rank + MARGIN_ROWS
    while True:
        chosen = _grown(chosen, gains, tau, wanted)
        # In the order of ranks: the same numbers however the pool is ordered.
        chosen = chosen[np.argsort(ranks[chosen], kind="stable")]
        found = search(rows.only(chosen), ranks[chosen], z, budget=budget, total=total)
        # Of this working set alone: with more rows the cut may lie elsewhere.
        left = chosen[found.left_out]
        z, tau, wanted = found.point.image, found.point.tau, 0
        steps += found.point.steps
        gains = rows.gains(z)
        near = tau - _rounding(rows.c, gains)
        # A row left out on the way, whose equals are not selected in the end, is no tie.
        tied = left[gains[left] > near]
        gains = _without(gains, left)
        if not _would_enter(gains, chosen, near):
            point = replace(found.point, steps=steps)
            return Verified(point, chosen, gains, tied, found.attainable)
        tau = near


def _without(gains: Float[np.ndarray, " n"], left: Int[np.ndarray, " t"]) -> np.ndarray:
    """Gains in which rows that are no part of the problem never count."""
    if len(left):
        gains = gains.copy()
        gains[left] = -math.inf
    return gains


def _rounding(c: np.ndarray, gains: np.ndarray) -> float:
    """How far two gains that are equal may lie apart in float64."""
    size = float(np.abs(c).max()) + float(np.abs(c - gains).max())
    return 64 * np.finfo(float).eps * size


def _would_enter(gains: np.ndarray, chosen: np.ndarray, tau: float) -> bool:
    """Whether a row outside the working set has a gain above tau."""
    return int(np.count_nonzero(gains > tau)) > int(np.count_nonzero(gains[chosen] > tau))


def _grown(
    chosen: Int[np.ndarray, " w"], gains: Float[np.ndarray, " n"], tau: float, wanted: int
) -> Int[np.ndarray, " v"]:
    """The working set with the best of the rows outside: `wanted`, or 0 for those that would enter.

    At most it doubles: an early solution can call for far more rows than the last one.
    """
    inside = np.zeros(len(gains), dtype=bool)
    inside[chosen] = True
    outside = np.flatnonzero(~inside & (gains > -math.inf))
    values = gains[outside]
    if not wanted:
        entering = int(np.count_nonzero(values > tau))
        wanted = min(max(2 * entering, FEWEST_NEW_ROWS), max(len(chosen), FEWEST_NEW_ROWS))
    if wanted < len(outside):
        bound = np.partition(values, len(values) - wanted)[len(values) - wanted]
        outside = outside[values >= bound]
    return np.concatenate([chosen, outside])


def _sampled_start(
    rows: FactorRows, ranks: Int[np.ndarray, " n"], budget: int, total: float
) -> Float[np.ndarray, " r"]:
    """z of the same programme on every s-th row by rank, with an s-th of the budget.

    s copies of each sampled row in place of the pool make the same problem but for lambda / s.
    """
    size = max(SMALLEST_SAMPLE, math.ceil(SAMPLE_BUDGET * len(rows) / budget))
    stride = len(rows) // size
    if stride < LEAST_STRIDE:
        return np.zeros(rows.rank)
    sample = np.flatnonzero(ranks % stride == 0)
    share = max(1, round(budget / stride))
    if len(sample) <= share:
        return np.zeros(rows.rank)
    return search_pool(rows.only(sample), ranks[sample] // stride, None, share, total).point.image
