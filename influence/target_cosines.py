"""What methods have in common that score by the cosine with the targets' mean embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from influence.job import Job, run_units, timed
from influence.score_map import map_scores
from influence.units import Unit

if TYPE_CHECKING:
    from influence.planned_work import Planner


def run_cosines(
    job: Job, reduce: Any, units: Sequence[Unit], targets: Mapping[str, Sequence[Unit]]
) -> None:
    """Embeddings of the candidates (`units`) and of the targets' rows, and their cosines."""
    run_units(job, [*(unit for members in targets.values() for unit in members), *units])
    with timed(job, "regression", quiet=True):
        predictor = reduce.fit_means(targets)
    scores = map_scores(job, units, predictor)
    with timed(job, "scores", quiet=True):
        reduce.take_cosines(scores)


def plan_cosines(
    planner: Planner,
    stage: str,
    units: Sequence[Unit],
    targets: Mapping[str, Sequence[Unit]],
    width: int,
) -> None:
    """Embeddings of so many numbers, and a map from them to scores."""
    of_targets = [unit for members in targets.values() for unit in members]
    planner.add(planner.missing.stage(stage, [*of_targets, *units]))
    embedding = planner.missing.stage(stage, units)
    planner.scores(embedding, units, width, planner.columns)
    planner.selection(0)
