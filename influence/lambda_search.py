"""The lambda at which exactly `budget` rows have weight, on a working set of rows.

The support is piecewise constant in lambda; without curvature the closed form of
`influence.weights` picks the largest lambda of the budget's piece, where the next row stands at the
edge. That point has its own equations: tau is the gain of the (k+1)-th row, lambda = sum over the
top k of (s_i - tau) / total, z = F'w. Newton's method on them takes the budget as it takes one
lambda. Where it does not converge (strong curvature: the support need not grow with lambda) lambda
is bracketed: along the path one row enters or leaves at a time, so that a bracket of the budget
holds a lambda that meets it, however often the path crosses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from influence.dual_newton import Point, solve_rows
from influence.working_set import ActiveGram, FactorRows

EDGE_STEPS = 25
BRACKET_STEPS = 200
LOWEST_LAMBDA = 1e-11
INNER_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Found:
    """A point with exactly the budget active, or the smallest support seen; rows left out as ties.

    Positions are those of the working set that was searched.
    """

    point: Point
    attainable: bool
    left_out: Int[np.ndarray, " t"]


@dataclass(frozen=True)
class _Edge:
    """The point where the (k+1)-th row is about to enter; `tied` are rows with its gain."""

    point: Point
    tied: Int[np.ndarray, " t"]


def search(
    rows: FactorRows,
    ranks: Int[np.ndarray, " w"],
    z: Float[np.ndarray, " r"],
    *,
    budget: int,
    total: float,
) -> Found:
    """Find lambda for a budget below the number of rows; ties at the cut go to smaller ranks.

    A tie is left out of the problem and the search begun again, so that what is found solves the
    programme on the other rows.
    """
    kept = np.arange(len(rows))
    left: list[np.ndarray] = []
    steps = 0
    while True:
        here = rows if len(kept) == len(rows) else rows.only(kept)
        if len(kept) == budget:
            point = equal_weights(here, total)
            return _on_all(replace(point, steps=steps), True, kept, left)
        gram = ActiveGram(here)
        point, attainable, surplus = _search_once(here, ranks[kept], z, budget, total, gram)
        steps += gram.steps
        if not len(surplus):
            attainable = attainable and len(point.active) == budget
            return _on_all(replace(point, steps=steps), attainable, kept, left)
        left.append(kept[surplus])
        kept = np.delete(kept, surplus)
        z = point.image


def _on_all(point: Point, attainable: bool, kept: np.ndarray, left: list[np.ndarray]) -> Found:
    point = replace(point, active=kept[point.active])
    return Found(point, attainable, np.concatenate([np.zeros(0, dtype=np.int64), *left]))


def equal_weights(rows: FactorRows, total: float) -> Point:
    """The solution of lambda = inf: every row alike; tau is -inf, for lambda w outgrows all."""
    everyone = np.arange(len(rows))
    weights = np.full(len(rows), total / len(rows))
    return Point(everyone, weights, -math.inf, rows.adjoint(everyone, weights), math.inf, 0)


def _search_once(
    rows: FactorRows,
    ranks: np.ndarray,
    z: np.ndarray,
    budget: int,
    total: float,
    gram: ActiveGram,
) -> tuple[Point, bool, np.ndarray]:
    """(point, attainable, tied rows to leave out before another search)."""
    none = np.zeros(0, dtype=np.int64)
    edge = _edge(rows, z, budget, total, gram)
    if edge is None:
        return _bracketed(rows, ranks, z, budget, total, gram)
    if not len(edge.tied):
        return edge.point, True, none
    return edge.point, True, _surplus(edge, ranks, budget)


def _surplus(edge: _Edge, ranks: np.ndarray, budget: int) -> np.ndarray:
    """Those of the tied rows that the budget has no room for: the largest ranks."""
    sure = np.setdiff1d(edge.point.active, edge.tied)
    order = edge.tied[np.argsort(ranks[edge.tied], kind="stable")]
    return np.sort(order[max(0, budget - len(sure)) :])


def _rounding(rows: FactorRows, z: np.ndarray) -> float:
    """How far two gains that are equal may lie apart in float64."""
    size = float(np.abs(rows.c).max()) + rows.reach() * float(np.linalg.norm(z))
    return 64 * np.finfo(float).eps * size


def _top(gains: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """(positions of the `budget` largest gains, sorted; position of the next one)."""
    order = np.argpartition(-gains, budget)
    active = np.sort(order[:budget])
    return active, int(order[budget])


def _edge(
    rows: FactorRows, z: np.ndarray, budget: int, total: float, gram: ActiveGram
) -> _Edge | None:
    """Newton's method on the equations of the module's docstring; None where it does not converge.

    A converged point has the k largest gains active and tau >= all the others: it is the solution
    of the programme at its lambda, wherever the iteration began.
    """
    aim = INNER_TOLERANCE * max(float(np.abs(rows.c).max()), np.finfo(float).tiny)
    before, last = np.zeros(0, dtype=np.int64), np.inf
    for step in range(EDGE_STEPS):
        gains = rows.gains(z)
        active, following = _top(gains, budget)
        tau = float(gains[following])
        excess = gains[active] - tau
        lam = float(excess.sum()) / total
        if not lam > np.finfo(float).eps * float(np.abs(gains).max()) / total:
            return None
        weights = excess / lam
        image = rows.adjoint(active, weights)
        residual = image - z
        size = float(np.linalg.norm(residual))
        settled = np.array_equal(active, before)
        if size * rows.reach() <= aim or (settled and 0.25 * last <= size <= 1e-9 * _norm(image)):
            return _finished(rows, Point(active, weights, tau, image, lam, step), total, gains)
        if step > 6 and size > 100 * last:
            return None
        direction = _edge_direction(rows, gram, active, following, z, lam, total, lam * residual)
        if direction is None:
            return None
        z, before, last = z + direction, active, size
    return None


def _norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))


def _finished(rows: FactorRows, point: Point, total: float, gains: np.ndarray) -> _Edge:
    near = _rounding(rows, point.image)
    tied = np.flatnonzero(np.abs(gains - point.tau) <= near)
    if len(np.intersect1d(tied, point.active)):
        return _Edge(point, tied)
    return _Edge(point, np.zeros(0, dtype=np.int64))


def _edge_direction(
    rows: FactorRows,
    gram: ActiveGram,
    active: np.ndarray,
    following: int,
    z: np.ndarray,
    lam: float,
    total: float,
    right: np.ndarray,
) -> np.ndarray | None:
    """dz of the Newton step in (z, tau, lambda).

    With M = F_A'F_A, h = F_A'1, f the next row: (lambda I + M) dz + h dtau + z dlambda = right,
    h'dz + k dtau + total dlambda = 0 and f'dz + dtau = 0.
    """
    matrix, ones = gram.of(active)
    row = rows.scale * rows.rows(np.array([following]))[0]
    # dtau = -f'dz, dlambda = (k f - h)'dz / total leave r equations in dz.
    system = matrix - np.outer(ones, row) + np.outer(z / total, len(active) * row - ones)
    system[np.diag_indices(len(system))] += lam
    try:
        found = np.linalg.solve(system, right)
    except np.linalg.LinAlgError:
        return None
    return found if np.all(np.isfinite(found)) else None


def _bracketed(
    rows: FactorRows,
    ranks: np.ndarray,
    z: np.ndarray,
    budget: int,
    total: float,
    gram: ActiveGram,
) -> tuple[Point, bool, np.ndarray]:
    """Bisection in log lambda between supports below and above the budget."""
    none = np.zeros(0, dtype=np.int64)

    def at(lam: float, start: np.ndarray) -> Point:
        return solve_rows(rows, start, lam=lam, total=total, tolerance=INNER_TOLERANCE, gram=gram)

    low, high, smallest = _bracket(rows, z, budget, total, at)
    if low is None:
        surplus = _surplus_twins(rows, smallest, ranks, budget)
        support = len(smallest.active)
        if not len(surplus) and support < len(rows):
            smallest, _, _ = _to_the_edge(rows, smallest, support, total, gram)
        return smallest, False, surplus
    for _ in range(BRACKET_STEPS):
        for end in (low, high):
            if len(end.active) == budget:
                return _to_the_edge(rows, end, budget, total, gram)
        entering = np.setdiff1d(high.active, low.active)
        if high.lam <= low.lam * (1 + 1e-12) or _alike(rows, entering, low, high):
            tied = np.setxor1d(high.active, low.active)
            return high, True, _surplus(_Edge(high, tied), ranks, budget)
        middle = at(_between(low, high, budget), high.image)
        if abs(len(middle.active) - budget) <= max(2, budget // 20):
            edge = _edge(rows, middle.image, budget, total, gram)
            if edge is not None and len(edge.tied):
                return edge.point, True, _surplus(edge, ranks, budget)
            if edge is not None:
                return edge.point, True, none
        if len(middle.active) < budget:
            low = middle
        else:
            high = middle
    return high, False, none


def _between(low: Point, high: Point, budget: int) -> float:
    """The lambda where the support's logarithm would meet the budget's, kept off the ends."""
    a, b = math.log(low.lam), math.log(high.lam)
    fewer, more = math.log(len(low.active)), math.log(len(high.active))
    share = (math.log(budget) - fewer) / (more - fewer)
    return math.exp(a + min(0.75, max(0.25, share)) * (b - a))


def _alike(rows: FactorRows, entering: np.ndarray, low: Point, high: Point) -> bool:
    """Whether the supports of a bracket differ by one group of equal rows alone."""
    if len(entering) < 2 or len(np.setdiff1d(low.active, high.active)):
        return False
    if np.any(rows.c[entering] != rows.c[entering[0]]):
        return False
    factor = rows.rows(entering)
    return bool(np.all(factor == factor[0]))


def _surplus_twins(rows: FactorRows, point: Point, ranks: np.ndarray, budget: int) -> np.ndarray:
    """Active rows equal to another active one (same c, same row of B), as many as are too many.

    Every lambda gives equal rows equal weights; one of a group does for all as far as curvature
    goes. The smallest weights go first, among equals the largest rank; each group keeps a row.
    """
    _, group, members = np.unique(rows.c[point.active], return_inverse=True, return_counts=True)
    shared = members[group] > 1
    candidates, weights = point.active[shared], point.weights[shared]
    if not len(candidates):
        return candidates
    full = np.column_stack([rows.c[candidates], rows.rows(candidates)])
    _, first, group = np.unique(full, axis=0, return_index=True, return_inverse=True)
    weights = weights[first][group.ravel()]
    order = np.lexsort((-ranks[candidates], group.ravel(), weights))
    # The last of a group in this order has its smallest rank, and stays.
    in_order = group.ravel()[order]
    spare = order[np.append(in_order[1:] == in_order[:-1], False)]
    return np.sort(candidates[spare[: len(point.active) - budget]])


def _to_the_edge(
    rows: FactorRows, point: Point, budget: int, total: float, gram: ActiveGram
) -> tuple[Point, bool, np.ndarray]:
    """The end of the piece where the next row enters, or the point itself where a row leaves."""
    edge = _edge(rows, point.image, budget, total, gram)
    if edge is not None and not len(edge.tied):
        point = edge.point
    return point, True, np.zeros(0, dtype=np.int64)


def _bracket(
    rows: FactorRows,
    z: np.ndarray,
    budget: int,
    total: float,
    at: Callable[[float, np.ndarray], Point],
) -> tuple[Point | None, Point, Point]:
    """(point at or below the budget or None, point at or above it, the smallest support seen)."""
    gains = rows.gains(z)
    active, following = _top(gains, budget)
    lam = float((gains[active] - gains[following]).sum()) / total
    # Below the rounding of the gains no lambda is told from another.
    rounding = 1e-13 * float(np.abs(gains).max()) / total
    if lam <= 1e3 * rounding:
        lam = max(1e-3 * rows.reach() ** 2, 1e-3 * float(np.ptp(gains)) / total, 1e3 * rounding)
    lowest = max(min(LOWEST_LAMBDA * rows.reach() ** 2, 1e-3 * lam), rounding)
    here = smallest = high = low = at(lam, z)
    factor = 1.5
    while len(here.active) > budget:
        high = here
        lam /= factor
        if lam < lowest:
            return None, high, smallest
        here = at(lam, here.image)
        factor = min(16.0, factor**1.5)
        if len(here.active) < len(smallest.active):
            smallest = here
    low = here
    if low is not high and high.lam > low.lam:
        return low, high, smallest
    while len(here.active) < budget:
        low = here
        lam *= factor
        here = at(lam, here.image)
        factor = min(16.0, factor**1.5)
    return low, here, smallest
