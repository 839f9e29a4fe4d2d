"""Method length: the longest responses first, the baseline that is hard to beat for its price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from influence.job import Job, timed
from influence.methods.kind import Method

if TYPE_CHECKING:
    from influence.planned_work import Planner
    from influence.row_scores import PoolRows


def score(rows: PoolRows) -> Float[np.ndarray, " n"]:
    """The response's tokens that are learnt, after the cut at `data.max_length`."""
    return rows.pool.n_response_tokens.astype(np.float64)


def run(job: Job, reduce: Any) -> None:
    """No stage: the catalogue has all that it takes."""
    with timed(job, "scores"):
        reduce.score_rows("length")


def plan(planner: Planner) -> None:
    """Nothing but the selection."""
    planner.selection(0)


METHOD = Method(title="Response length", run=run, plan=plan, score=score, runs_model=False)
