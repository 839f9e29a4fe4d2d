"""The report's section on the second order: what was minimised, and what budgets would do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence import plots
from influence.objective import Objective

CURVATURES = {
    "fisher": "the covariance of the target rows' own gradients (the Fisher matrix)",
    "hvp": "exact Hessian-vector products on the target rows",
}


@dataclass(frozen=True)
class ObjectiveReport:
    """What the section shows: the account of the run, its curvature in words, the path's figure."""

    account: Objective
    curvature: str
    figure: plots.Plot | None


def objective_report(account: Objective | None) -> ObjectiveReport | None:
    """None for a run of the first order."""
    if account is None:
        return None
    support = np.asarray([point.support for point in account.path], dtype=np.float64)
    figure = plots.budget_path(
        support,
        np.asarray([point.effective_rows for point in account.path]),
        np.asarray([point.predicted_second for point in account.path]),
        account.support,
        f"Effective rows and predicted change of the target loss of {len(support)} budgets.",
    )
    curvature = CURVATURES.get(account.curvature, account.curvature)
    return ObjectiveReport(account, curvature, figure)
