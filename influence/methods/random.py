"""Method random: a uniform draw, the baseline that every claim is judged against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from influence import scoring
from influence.job import Job, timed
from influence.methods.kind import Method

if TYPE_CHECKING:
    from influence.planned_work import Planner
    from influence.row_scores import PoolRows


def score(rows: PoolRows) -> Float[np.ndarray, " n"]:
    """A number in [0, 1) by the seed and a row's messages: equal for equal rows, in any pool."""
    values, eligible = np.full(len(rows.pool), np.nan), rows.pool.eligible
    digests = [rows.pool.digests[position] for position in eligible]
    values[eligible] = scoring.random_scores(rows.config.seed, digests)[:, 0]
    return values


def run(job: Job, reduce: Any) -> None:
    """No stage: the catalogue has all that it takes."""
    with timed(job, "scores"):
        reduce.score_rows("random")


def plan(planner: Planner) -> None:
    """Nothing but the selection."""
    planner.selection(0)


METHOD = Method(title="Random selection", run=run, plan=plan, score=score, runs_model=False)
