"""Method exact: first order with every row's gradient, the truth that others are judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from influence.curvature_stages import second_order
from influence.exact_work import exact_units
from influence.job import Job, run_units, timed
from influence.methods.kind import Method
from influence.quantities import Quantities, StageWork, driver_seconds

if TYPE_CHECKING:
    from influence.planned_work import Planner


def run(job: Job, reduce: Any) -> None:
    """Gradients of every candidate and target row, and their inner products."""
    units = exact_units(job, reduce, None)
    run_units(job, units.all)
    if job.config.weights.order == 2:
        second_order(job, reduce, units)
    with timed(job, "scores"):
        reduce.score_exact(units)


def plan(planner: Planner) -> None:
    """Gradients of all rows, which the driver then reads."""
    gradients = planner.gradients(None)
    planner.add(gradients)
    planner.second_order(gradients, None)
    numbers = float(planner.counts["rows"] * (planner.columns + 8))
    read = gradients.whole + planner.beside
    scoring = Quantities(read=read, effort=driver_seconds(1, 0.0, numbers))
    planner.add(StageWork("scores", scoring, replicas=False))
    planner.selection(0)


METHOD = Method(
    title="Exact first-order influence",
    run=run,
    plan=plan,
    needs_gradients=True,
    steps=True,
    solves_weights=True,
)
