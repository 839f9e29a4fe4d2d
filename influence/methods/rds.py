"""Method RDS+ (Ivison et al., arXiv 2503.01807): cosines of pooled hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from influence.job import Job, run_units, timed
from influence.methods.kind import Method
from influence.pool_units import embedding_units, rds_target_units
from influence.score_map import map_scores

if TYPE_CHECKING:
    from influence.planned_work import Planner


def run(job: Job, reduce: Any) -> None:
    """One forward pass of every row, and the cosines with the targets' mean states."""
    embedding = embedding_units(job)
    targets = rds_target_units(job)
    run_units(job, [*(unit for units in targets.values() for unit in units), *embedding])
    with timed(job, "regression", quiet=True):
        predictor = reduce.fit_means(targets)
    scores = map_scores(job, embedding, predictor)
    with timed(job, "scores", quiet=True):
        reduce.take_cosines(scores)


def plan(planner: Planner) -> None:
    """Embeddings, and a map from them to scores."""
    units = embedding_units(planner.job)
    of_targets = [u for members in rds_target_units(planner.job).values() for u in members]
    planner.add(planner.missing.stage("embedding", [*of_targets, *units]))
    embedding = planner.missing.stage("embedding", units)
    planner.scores(embedding, units, planner.missing.width, planner.columns)
    planner.selection(0)


METHOD = Method(
    title="RDS+",
    run=run,
    plan=plan,
    embeds=True,
    embeds_targets=True,
    embedding_kind="rds",
)
