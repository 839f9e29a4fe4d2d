"""What lambda does: solutions of the robust objective along lambda or along budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.errors import InputError
from influence.robust_program import Solution, solve, solve_budget


@dataclass(frozen=True)
class PathPoint:
    """One solution along the path.

    support: rows with weight. entropy: of the weights' shares, in nats; effective_rows: its
    exponential, the number of equally weighted rows of the same entropy.
    linear, quadratic: the terms of `predicted_change`, their sum, which is the change of the mean
    target loss by one step of size eta on the weights, but for terms without them.
    attainable: of the budget, where the path is along budgets.
    """

    lam: float
    support: int
    entropy: float
    effective_rows: float
    linear: float
    quadratic: float
    predicted_change: float
    kkt: float
    attainable: bool


def weights_entropy(weights: Float[np.ndarray, " n"]) -> float:
    """Entropy in nats of the shares w_i / sum(w); 0 log 0 = 0."""
    shares = weights[weights > 0] / weights.sum()
    return float(-(shares * np.log(shares)).sum())


def lambda_path(
    c: Float[np.ndarray, " n"],
    factor: Float[np.ndarray, "n r"],
    *,
    eta: float,
    lams: Sequence[float] | None = None,
    budgets: Sequence[int] | None = None,
    ranks: Int[np.ndarray, " n"] | None = None,
    total: float | None = None,
) -> list[PathPoint]:
    """Solutions for the given lambdas, or for the lambdas of the given budgets, in their order.

    Each begins at the one before it, which costs little where they are sorted. The change of the
    target loss follows Influence Distillation (arXiv 2505.19051, section 3), with the total n:

        -(eta / n) c'w + (eta^2 / (2n)) w'Q w,    Q = B B'

    `ranks` break ties of budgets (default: by position).

    Raises InputError if not exactly one of `lams` and `budgets` is given, and as `solve` does.
    """
    if (lams is None) == (budgets is None):
        raise InputError("lambda path: expected either lambdas or budgets, and not both")
    n = float(len(c)) if total is None else float(total)
    order = np.arange(len(c)) if ranks is None else ranks
    points: list[PathPoint] = []
    start: Solution | None = None
    for lam in lams or ():
        start = solve(c, factor, eta=eta, lam=lam, total=total, start=start)
        points.append(_point(start, c, eta, n, True))
    for budget in budgets or ():
        found = solve_budget(c, factor, order, eta=eta, budget=budget, total=total, start=start)
        start = found.solution
        points.append(_point(start, c, eta, n, found.attainable))
    return points


def _point(
    solution: Solution, c: Float[np.ndarray, " n"], eta: float, n: float, attainable: bool
) -> PathPoint:
    entropy = weights_entropy(solution.weights)
    linear = -eta / n * float(np.asarray(c, np.float64) @ solution.weights)
    quadratic = eta**2 / (2 * n) * float(solution.image @ solution.image)
    return PathPoint(
        solution.lam,
        int(np.count_nonzero(solution.weights)),
        entropy,
        float(np.exp(entropy)),
        linear,
        quadratic,
        linear + quadratic,
        solution.kkt,
        attainable,
    )
