"""Method RDS+ (Ivison et al., arXiv 2503.01807): cosines of pooled hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from influence.job import Job
from influence.methods.kind import Method
from influence.pool_units import embedding_units, rds_target_units
from influence.target_cosines import plan_cosines, run_cosines

if TYPE_CHECKING:
    from influence.planned_work import Planner


def run(job: Job, reduce: Any) -> None:
    """One forward pass of every row, and the cosines with the targets' mean states."""
    run_cosines(job, reduce, embedding_units(job), rds_target_units(job))


def plan(planner: Planner) -> None:
    """Embeddings, and a map from them to scores."""
    job, width = planner.job, planner.missing.width
    plan_cosines(planner, "embedding", embedding_units(job), rds_target_units(job), width)


METHOD = Method(
    title="RDS+",
    run=run,
    plan=plan,
    embeds=True,
    embeds_targets=True,
    embedding_kind="rds",
)
