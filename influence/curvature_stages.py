"""The second order's own steps of a job, between the gradients and the scores."""

from __future__ import annotations

from typing import Any

from influence.job import Job, timed
from influence.units import ExactUnits

STAGE = "second_order"


def second_order(job: Job, reduce: Any, exact: ExactUnits) -> None:
    """What the curvature is made of, once the gradients' shards of `exact` are there."""
    with timed(job, STAGE):
        reduce.begin_second_order(exact)
