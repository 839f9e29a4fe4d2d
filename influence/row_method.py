"""Methods that give every row a number of its own: from the catalogue, or from one stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from influence.job import Job, run_units, timed
from influence.methods.kind import Method
from influence.pool_units import row_units
from influence.quantities import Quantities, StageWork, driver_seconds
from influence.row_scores import Score
from influence.row_stages import RowStage

if TYPE_CHECKING:
    from influence.planned_work import Planner


def row_method(
    name: str,
    title: str,
    score: Score,
    *,
    stage: RowStage | None = None,
    runs_model: bool = False,
    no_score: str = "score is not finite",
) -> Method:
    """A method with nothing but a scoring function, and the stage whose shards that reads, if any.

    name: in the registry. runs_model: whether the stage does. The rest is as in `Method`.
    """

    def run(job: Job, reduce: Any) -> None:
        units = [] if stage is None else row_units(job, stage.name)
        if units:
            run_units(job, units)
        with timed(job, "scores"):
            reduce.score_rows(name, units)

    def plan(planner: Planner) -> None:
        if stage is not None:
            work = planner.missing.stage(stage.name, row_units(planner.job, stage.name))
            planner.add(work)
            effort = driver_seconds(1, 0.0, float(planner.counts["rows"]))
            reading = Quantities(read=work.whole, effort=effort)
            planner.add(StageWork("scores", reading, replicas=False))
        planner.selection(0)

    stages = () if stage is None else (stage,)
    return Method(
        title, run, plan, runs_model=runs_model, score=score, no_score=no_score, stages=stages
    )
