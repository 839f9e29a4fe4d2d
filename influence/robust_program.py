"""Weights of the whole robust objective: a quadratic programme over the simplex of a large pool.

Influence Distillation (arXiv 2505.19051, section 3), with Q = B B' of low rank, never formed:

    minimise over w:  -c'w + (eta/2) w'Q w + (lambda/2) |w|^2    subject to  w >= 0, sum(w) = total

with c = p - eta q. A solution is w_i = max(0, c_i - eta b_i'B'w - tau) / lambda, so only the rows
with a positive reduced gain c_i - eta b_i'B'w - tau matter: the programme is solved on a working
set of rows, and one pass over all of them proves that no other would enter, or says which would.
Without curvature (eta = 0 or Q = 0) this is the closed form of `influence.weights`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.errors import InputError
from influence.lambda_search import equal_weights
from influence.screening import Verified, first_order, search_pool, solve_pool
from influence.working_set import BLOCK_ELEMENTS, FactorRows


@dataclass(frozen=True)
class Solution:
    """The optimum for one lambda.

    weights: (n,) float64, sum `total`, exact zeros outside the support.
    multiplier: tau, the dual of sum(w) = total; -inf where lambda is inf.
    image: (r,) B'w.
    kkt: the residual of `kkt_residual`.
    iterations: Newton steps, all working sets together.
    """

    weights: Float[np.ndarray, " n"]
    multiplier: float
    image: Float[np.ndarray, " r"]
    lam: float
    kkt: float
    iterations: int


@dataclass(frozen=True)
class BudgetSolution:
    """The optimum whose support is the budget, or the smallest that was found above it.

    left_out: rows equal to the last selected one (in gain) that the tie breaker left out of the
    problem; the solution is the optimum on all the others.
    outside: rows never looked at in the solve; bound: the largest reduced gain among them, negative
    (-inf where there are none): none of them would enter.
    """

    solution: Solution
    budget: int
    support: int
    attainable: bool
    left_out: int
    outside: int
    bound: float


def solve(
    c: Float[np.ndarray, " n"],
    factor: Float[np.ndarray, "n r"],
    *,
    eta: float,
    lam: float,
    total: float | None = None,
    start: Solution | None = None,
    tolerance: float = 1e-10,
) -> Solution:
    """The weights for one lambda; `total` is their sum (default: the number of rows).

    `factor` is B, float32 or float64; `start` a solution for another lambda nearby. Ends when the
    KKT residual (`kkt_residual`) is below `tolerance`, or where rounding lets it fall no further:
    `Solution.kkt` says which.

    Raises InputError for a value that is not finite, shapes that do not fit, lam <= 0.
    """
    c, total = _checked(c, factor, eta, total)
    if not (np.isfinite(lam) and lam > 0):
        raise InputError(f"lambda: expected a finite number above 0, got {lam}")
    rows = FactorRows(c, factor, math.sqrt(eta))
    z = np.zeros(rows.rank) if start is None else rows.scale * start.image
    return _solution(solve_pool(rows, z, lam=lam, total=total, tolerance=tolerance), rows, total)


def solve_budget(
    c: Float[np.ndarray, " n"],
    factor: Float[np.ndarray, "n r"],
    ranks: Int[np.ndarray, " n"],
    *,
    eta: float,
    budget: int,
    total: float | None = None,
    start: Solution | None = None,
) -> BudgetSolution:
    """The weights for the largest lambda of a range in which exactly `budget` rows have any.

    `ranks` break ties, smaller wins (`influence.weights.id_ranks`); a tie left out is no part of
    the problem. A budget of all rows or more gives equal weights, lambda = inf. Where curvature is
    so strong that no lambda found has so few rows, the smallest support found: attainable is False.

    Raises InputError for a value that is not finite, shapes that do not fit, a budget below 1.
    """
    c, total = _checked(c, factor, eta, total)
    if budget < 1:
        raise InputError(f"selection.budget: expected at least 1 row, got {budget}")
    if len(ranks) != len(c):
        raise InputError(f"ranks: expected one for each of {len(c)} rows, got {len(ranks)}")
    rows = FactorRows(c, factor, math.sqrt(eta))
    ranks = np.asarray(ranks)
    if budget >= len(c):
        point = equal_weights(rows, total)
        return _budget_solution(Verified.of_all(point, rows), rows, total, budget)
    if eta == 0 or not _curved(factor):
        return _budget_solution(first_order(rows, ranks, budget, total), rows, total, budget)
    z = None if start is None else rows.scale * start.image
    return _budget_solution(search_pool(rows, ranks, z, budget, total), rows, total, budget)


def kkt_residual(
    gains: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    *,
    tau: float,
    lam: float,
    total: float,
    size: float,
) -> float:
    """How far weights are from the optimum: 0 there, and relative to the gradient's scale.

    With g = gains - lambda w - tau and gains = c - eta B B'w of these very weights, the largest of
    |g_i| over rows with weight and max(0, g_i) over the others, divided by `size` (the largest |c|)
    or by the largest lambda w_i where that is more; and |sum(w) - total| / total. For lambda = inf
    only the sum is left to check.
    """
    error = abs(float(weights.sum()) - total) / total
    if np.isinf(lam):
        return error
    g = gains - lam * weights - tau
    violation = np.where(weights > 0, np.abs(g), np.maximum(g, 0.0))
    scale = max(size, lam * float(weights.max()), np.finfo(float).tiny)
    return max(error, float(violation.max()) / scale)


def _solution(found: Verified, rows: FactorRows, total: float) -> Solution:
    point = found.point
    weights = np.zeros(len(rows))
    weights[found.chosen[point.active]] = point.weights
    kkt = kkt_residual(
        found.gains,
        weights,
        tau=point.tau,
        lam=point.lam,
        total=total,
        size=float(np.abs(rows.c).max()),
    )
    # Not z / sqrt(eta): with eta = 0 the image is no part of the solve, and still B'w.
    image = rows.adjoint(found.chosen[point.active], point.weights, scaled=False)
    return Solution(weights, point.tau, image, point.lam, kkt, point.steps)


def _budget_solution(
    found: Verified, rows: FactorRows, total: float, budget: int
) -> BudgetSolution:
    outside = np.ones(len(rows), dtype=bool)
    outside[found.chosen] = outside[found.left_out] = False
    count = int(np.count_nonzero(outside))
    bound = float(found.gains[outside].max()) - found.point.tau if count else -math.inf
    return BudgetSolution(
        _solution(found, rows, total),
        budget,
        len(found.point.active),
        found.attainable,
        len(found.left_out),
        count,
        bound,
    )


def _curved(factor: Float[np.ndarray, "n r"]) -> bool:
    return bool(factor[:1].any() or factor.any())


def _checked(
    c: Float[np.ndarray, " n"],
    factor: Float[np.ndarray, "n r"],
    eta: float,
    total: float | None,
) -> tuple[Float[np.ndarray, " n"], float]:
    """(c in float64, the sum of the weights); InputError names what cannot be used."""
    c = np.asarray(c, dtype=np.float64)
    if c.ndim != 1 or factor.ndim != 2 or len(factor) != len(c):
        raise InputError(
            f"curvature factor: expected one row for each of the {c.shape} gains, "
            f"got shape {factor.shape}"
        )
    if not len(c):
        raise InputError("selection: no row with a score to select; see the reasons in the report")
    if factor.dtype not in (np.float32, np.float64):
        raise InputError(f"curvature factor: expected float32 or float64, got {factor.dtype}")
    if not (np.isfinite(eta) and eta >= 0):
        raise InputError(f"weights.eta: expected a finite number of at least 0, got {eta}")
    total = float(len(c)) if total is None else float(total)
    if not (np.isfinite(total) and total > 0):
        raise InputError(f"total: expected a finite sum of the weights above 0, got {total}")
    for name, values in (("gains", c), ("curvature factor", factor)):
        row = _first_not_finite(values)
        if row is not None:
            raise InputError(
                f"{name}: row {row} is not finite; expected finite numbers, "
                "rows that cannot be scored left out"
            )
    return c, total


def _first_not_finite(values: np.ndarray) -> int | None:
    """The first row with a NaN or an infinity; a sum over the whole finds out at little cost."""
    step = max(1, BLOCK_ELEMENTS // max(1, values[0].size))
    for first in range(0, len(values), step):
        block = values[first : first + step].reshape(len(values[first : first + step]), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            suspect = not np.isfinite(block.sum())
        if suspect and not np.isfinite(block).all():
            return first + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
    return None
