"""The quadratic programme over the simplex for one lambda: semismooth Newton on its dual.

Influence Distillation (arXiv 2505.19051, section 3), with F = sqrt(eta) B and gains s = c - F z:

    minimise over w:  -c'w + |F'w|^2 / 2 + lambda |w|^2 / 2    subject to  w >= 0, sum(w) = total

has the dual: minimise over z (r numbers) and tau

    |z|^2 / 2 + total tau + sum over i of max(0, s_i - tau)^2 / (2 lambda),

whose minimum in tau is the projection of s / lambda to the simplex, w_i = max(0, s_i - tau) /
lambda. What is left is strongly convex and piecewise quadratic in z with gradient z - F'w, so that
Newton's method with a line search ends at the exact solution once the active rows are found.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from scipy import linalg

from influence.working_set import ActiveGram, FactorRows

QUICK_STEPS = 40
NEWTON_STEPS = 300
EASY_LAMBDA = 1e-2
DESCENT = 0.1
SMALLEST_LAMBDA = 1e-13
DESCENT_TOLERANCE = 1e-3
LINE_STEPS = 40
DENSE_ACTIVE = 256


@dataclass(frozen=True)
class Point:
    """A solution on some rows: the positions of the active ones, their weights, and the duals."""

    active: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    tau: float
    image: Float[np.ndarray, " r"]  # z = F'w
    lam: float
    steps: int


def threshold(gains: Float[np.ndarray, " n"], amount: float) -> float:
    """tau with sum over i of max(0, gains_i - tau) = amount > 0.

    Newton's method on a convex, piecewise linear function from its left: it ends in finitely
    many steps, no sort.
    """
    tau = max(float(gains.max()) - amount, float(gains.mean()) - amount / len(gains))
    count = -1
    inside = gains
    while True:
        inside = inside[inside > tau]
        if len(inside) == 0:
            # The amount is below the rounding of the gains: the largest of them share it.
            return float(np.nextafter(gains.max(), -np.inf))
        if len(inside) == count:
            return tau
        count = len(inside)
        # The mean of differences: no cancellation of large sums.
        tau += (float((inside - tau).sum()) - amount) / count


def newton_direction(
    gram: Float[np.ndarray, "r r"],
    ones: Float[np.ndarray, " r"],
    count: int,
    lam: float,
    right: Float[np.ndarray, " r"],
) -> Float[np.ndarray, " r"]:
    """(lambda I + F_A'F_A - F_A'1 1'F_A / |A|)^-1 right."""
    matrix = gram - np.outer(ones, ones) / count
    size = float(np.trace(gram))
    lift = lam
    while True:
        shifted = matrix.copy()
        shifted[np.diag_indices(len(shifted))] += lift
        try:
            return linalg.cho_solve(linalg.cho_factor(shifted, lower=True), right)
        except linalg.LinAlgError:
            # lambda below the rounding of the Gram matrix: a longer step is no use there.
            lift = max(10 * lift, np.finfo(float).eps * max(size, 1e-300))


def _dual(
    z: np.ndarray, gains: np.ndarray, lam: float, total: float
) -> tuple[float, float, np.ndarray]:
    """(value, tau, max(0, gains - tau)) of the dual with tau minimised out."""
    tau = threshold(gains, lam * total)
    excess = np.maximum(gains - tau, 0.0)
    return float(z @ z) / 2 + total * tau + float(excess @ excess) / (2 * lam), tau, excess


def _line_search(
    z: np.ndarray,
    gains: np.ndarray,
    direction: np.ndarray,
    change: np.ndarray,
    lam: float,
    total: float,
) -> float:
    """A step in (0, 1] that lowers the dual: its derivative along the line is monotone."""
    value, _, excess = _dual(z, gains, lam, total)
    slope = float(z @ direction) - float(change @ excess) / lam
    if slope >= 0:
        return 1.0  # within rounding of the minimum
    low, high, step = 0.0, 1.0, 1.0
    below, above, last = slope, math.inf, 0.0
    for _ in range(LINE_STEPS):
        at, _, excess = _dual(z + step * direction, gains - step * change, lam, total)
        here = float((z + step * direction) @ direction) - float(change @ excess) / lam
        if abs(here) <= 0.1 * abs(slope) and at <= value:
            return step
        if here > 0:
            # Regula falsi by Illinois: an end that stays has its derivative halved.
            below = 0.5 * below if last > 0 else below
            high, above = step, here
        elif step == 1.0:
            return step
        else:
            above = 0.5 * above if last < 0 else above
            low, below = step, here
        last = here
        step = low + (high - low) * below / (below - above)
    return low if low > 0 else step


def solve_rows(
    rows: FactorRows,
    z: Float[np.ndarray, " r"],
    *,
    lam: float,
    total: float,
    tolerance: float,
    gram: ActiveGram | None = None,
) -> Point:
    """The solution on these rows from the start z = F'w.

    Ends where the gradient of every row, |F (z - F'w)|, is below `tolerance` times the largest |c|,
    or where rounding lets it fall no further. A lambda that float64 cannot tell from 0 beside the
    gains and the curvature is raised to one that it can, which moves the gradient by rounding.
    """
    gram = ActiveGram(rows) if gram is None else gram
    aim = tolerance * max(float(np.abs(rows.c).max()), np.finfo(float).tiny)
    least = SMALLEST_LAMBDA * max(rows.reach() ** 2, float(np.ptp(rows.c)) / total)
    used = max(lam, least)
    point, settled = _newton(rows, z, used, total, aim, gram, QUICK_STEPS)
    if not settled:
        # Far below the rows' own curvature the active rows change a few at a time: by stages.
        nearer = z
        if used < rows.reach() ** 2:
            rough = max(tolerance, DESCENT_TOLERANCE)
            nearer = solve_rows(
                rows, z, lam=used / DESCENT, total=total, tolerance=rough, gram=gram
            ).image
        point, _ = _newton(rows, nearer, used, total, aim, gram, NEWTON_STEPS)
    return _polished(rows, replace(point, lam=lam), total)


def _newton(
    rows: FactorRows,
    z: np.ndarray,
    lam: float,
    total: float,
    aim: float,
    gram: ActiveGram,
    limit: int,
) -> tuple[Point, bool]:
    """(the point after at most `limit` steps, whether the solution is reached)."""
    gains = rows.gains(z)
    before, last, full = np.zeros(0, dtype=np.int64), np.inf, False
    for step in range(limit + 1):
        tau = threshold(gains, lam * total)
        active = np.flatnonzero(gains > tau)
        weights = gains[active] - tau
        # The sum is lambda * total up to rounding, which is not small where lambda is.
        weights *= total / weights.sum()
        image = rows.adjoint(active, weights)
        residual = image - z
        size = float(np.linalg.norm(residual))
        same = full and np.array_equal(active, before)
        point = Point(active, weights, tau, image, lam, step)
        if size * rows.reach() <= aim or (same and size >= 0.25 * last):
            return point, True
        if step == limit:
            break
        matrix, ones = gram.of(active)
        direction = newton_direction(matrix, ones, len(active), lam, lam * residual)
        change = rows.times(direction)
        length = _line_search(z, gains, direction, change, lam, total)
        z = z + length * direction
        gains = rows.gains(z) if same else gains - length * change
        before, last, full = active, size, length == 1.0
    return point, False


def descend(
    rows: FactorRows, z: Float[np.ndarray, " r"], *, lam: float, total: float
) -> Float[np.ndarray, " r"]:
    """A start for a small lambda: rough solutions for larger ones, down to it.

    Newton's method takes few steps from anywhere while lambda is of the size of a row's own
    curvature |f_i|^2; far below, the active rows change one by one along its line searches.
    """
    level = EASY_LAMBDA * rows.reach() ** 2
    lam = max(lam, SMALLEST_LAMBDA * level)
    while level > lam:
        z = solve_rows(rows, z, lam=level, total=total, tolerance=DESCENT_TOLERANCE).image
        level *= DESCENT
    return z


def _polished(rows: FactorRows, point: Point, total: float) -> Point:
    """The weights of few active rows from their own equations: exact for the smallest lambda.

    w = (s - tau) / lambda loses the digits that s and tau share; (F_A F_A' + lambda I) w + tau = c
    does not. Kept where it lowers the residual of the active rows.
    """
    count = len(point.active)
    if count > max(2 * rows.rank + 2, DENSE_ACTIVE):
        return point
    F, c = rows.scale * rows.rows(point.active), rows.c[point.active]
    matrix = np.ones((count + 1, count + 1))
    matrix[:count, :count] = F @ F.T
    matrix[np.arange(count), np.arange(count)] += point.lam
    matrix[count, count] = 0.0
    try:
        with warnings.catch_warnings():
            # What it solves badly is seen in the residual.
            warnings.simplefilter("ignore", linalg.LinAlgWarning)
            found = linalg.solve(matrix, np.append(c, total), assume_a="sym")
    except linalg.LinAlgError:
        return point

    def residual(candidate: Point) -> float:
        left = c - F @ candidate.image - candidate.lam * candidate.weights - candidate.tau
        return float(np.abs(left).max())

    weights = found[:count]
    if not np.all(weights > 0):
        return point
    better = replace(point, weights=weights, tau=float(found[count]), image=weights @ F)
    return better if residual(better) < residual(point) else point
