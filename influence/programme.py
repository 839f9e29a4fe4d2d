"""The robust programme of a pool: gains and curvature in, a selection and its account out.

Influence Distillation (arXiv 2505.19051, section 3): minimise -(p - eta q)'w + (eta/2) w'Qw +
(lambda/2) |w|^2 over w >= 0 with sum(w) = n. `influence.robust_program` solves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.curvature import Curvature
from influence.lambda_path import weights_entropy
from influence.objective import Objective, PathPoint
from influence.robust_program import BudgetSolution, Solution, solve_budget
from influence.step_prediction import PredictedChange, predicted_change

# Budgets of the path, as multiples of the run's own; the whole pool is its end.
PATH = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_NO_LAMBDA = "lambda is infinite: the budget holds every row, and all weights are equal"
_MISSED = "no lambda gives this budget: curvature spreads the weights over more rows"


@dataclass(frozen=True)
class Programme:
    """Everything that the programme is made of, over the n rows of a pool that have scores.

    p: gains. ranks: the tie breaker's place of every row. kind: where the curvature is from.
    uncovered: share of the landmarks' rows outside the directions. offset_gradient: g_T'b.
    """

    p: Float[np.ndarray, " n"]
    curvature: Curvature
    ranks: Int[np.ndarray, " n"]
    eta: float
    kind: str
    uncovered: float = 0.0
    offset_gradient: float = 0.0

    def solve(self, budget: int, start: Solution | None = None) -> BudgetSolution:
        """The weights for a number of rows; see `influence.robust_program.solve_budget`."""
        c = self.p - self.eta * self.curvature.drift
        return solve_budget(
            c, self.curvature.factor, self.ranks, eta=self.eta, budget=budget, start=start
        )

    def predicted(self, weights: Float[np.ndarray, " n"]) -> PredictedChange:
        """Change of the mean target loss by one step on these weights."""
        return predicted_change(
            weights,
            self.p,
            eta=self.eta,
            quadratic=self.curvature.quadratic(weights, clipped=False),
            drift=self.curvature.drift,
            offset_gradient=self.offset_gradient,
            offset_curvature=self.curvature.offset,
        )

    def order(self, weights: Float[np.ndarray, " n"]) -> Int[np.ndarray, " k"]:
        """The rows with weight, heaviest first, ties by `ranks`."""
        rows = np.flatnonzero(weights > 0)
        return rows[np.lexsort((self.ranks[rows], -weights[rows]))]


def account_of(programme: Programme, found: BudgetSolution, path: Sequence[PathPoint]) -> Objective:
    """What there is to say of a solution, with the path over other budgets."""
    solution, curvature = found.solution, programme.curvature
    change = programme.predicted(solution.weights)
    lam = _finite(solution.lam)
    note = _NO_LAMBDA if lam is None else None if found.attainable else _MISSED
    return Objective(
        curvature=programme.kind,
        eta=programme.eta,
        directions=curvature.factor.shape[1],
        lam=lam,
        note=note,
        budget=found.budget,
        support=found.support,
        attainable=found.attainable,
        kkt=solution.kkt,
        iterations=solution.iterations,
        left_out=found.left_out,
        outside=found.outside,
        bound=_finite(found.bound),
        effective_rows=math.exp(weights_entropy(solution.weights)),
        clipped=curvature.clipped,
        uncovered=programme.uncovered,
        asymmetry=curvature.asymmetry,
        offset_gradient=programme.offset_gradient,
        offset_curvature=curvature.offset,
        predicted_first=change.first,
        predicted_second=change.second,
        path=list(path),
    )


def budget_path(programme: Programme, found: BudgetSolution) -> list[PathPoint]:
    """Optima for budgets around that of `found` and for the whole pool, smallest first.

    A budget that has been solved for is not solved again.
    """
    n, own = len(programme.p), found.budget
    budgets = sorted({min(n, max(1, round(own * part))) for part in PATH} | {own, n})
    points, start = [], None
    for budget in budgets:
        each = found if budget == own else programme.solve(budget, start)
        # All of the pool in equal parts is no start for the others.
        start = each.solution if np.isfinite(each.solution.lam) else None
        points.append(_point(programme, each))
    return points


def _point(programme: Programme, found: BudgetSolution) -> PathPoint:
    weights = found.solution.weights
    change = programme.predicted(weights)
    return PathPoint(
        budget=found.budget,
        support=found.support,
        attainable=found.attainable,
        lam=_finite(found.solution.lam),
        effective_rows=math.exp(weights_entropy(weights)),
        predicted_first=change.first,
        predicted_second=change.second,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
