"""Method random: a uniform draw, the baseline that every claim is judged against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from influence.job import Job, timed
from influence.methods.kind import Method

if TYPE_CHECKING:
    from influence.planned_work import Planner


def run(job: Job, reduce: Any) -> None:
    """A number for each row, by the seed and its messages."""
    with timed(job, "scores"):
        reduce.score_random()


def plan(planner: Planner) -> None:
    """Nothing but the selection."""
    planner.selection(0)


METHOD = Method(title="Random selection", run=run, plan=plan, runs_model=False)
