"""The bill of a run at work: planned when the catalogue is there, settled when the run is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from influence import cost, history, storage
from influence.bill import planned_bill, replicas_at_once, settled
from influence.cache import Cache
from influence.errors import InfluenceError
from influence.job import Job
from influence.methods import METHODS
from influence.model_shape import ModelShape
from influence.own_training import STAGES as TRAINED
from influence.own_training_work import training_bytes, training_flops
from influence.plan_schemas import Amounts, Bill, Measured, MeasuredStage, StageBill
from influence.planned_work import plan_work
from influence.quantities import DRIVER, OF_RUN, StageWork
from influence.records import Manifest, StageRecord
from influence.result_bytes import result_sizes
from influence.row_stages import row_stage
from influence.score_shards import scoring_url
from influence.speeds import Speeds
from influence.stored import Stored


def replicas_of(job: Job) -> int:
    """Replicas that work at once at most."""
    return job.replicas if job.replicas is not None else replicas_at_once(job.config)


def begin_bill(job: Job, reduce: Any, counts: Mapping[str, Any], *before: StageWork) -> None:
    """Write the planned bill into the run's record; `job.chosen` is drawn on the way.

    `before`: what came before the catalogue was there.
    """
    runs = history.recall(job.config.cache_url)
    shape = shape_of(job)
    job.asked = history.decision_digest(job)  # while no pilot has chosen layers
    rounds = history.decided(job, runs)
    work = plan_work(job, reduce, counts, shape, replicas_of(job), rounds)
    job.chosen = work.chosen
    speeds = Speeds(job.config, shape, job.fingerprints, runs)
    stages = [*before, *work.stages.values()]
    job.log.manifest.bill = planned_bill(stages, job.config, speeds, replicas_of(job))


def shape_of(job: Job) -> ModelShape | None:
    """The shape of the job's model, if its method has one."""
    if not METHODS[job.config.method].runs_model:
        return None
    return job.model_shape


def end_bill(job: Job, exact: int) -> None:
    """Put what the run took beside what was planned, and leave its speeds in the cache.

    `exact` is the number of candidates with exact scores. Called before the score shards are
    removed, whose bytes count. A store that fails here costs the run no more than a note.
    """
    if job.log.manifest.bill is None:
        return
    try:
        _settle(job, job.log.manifest.bill)
        _remember(job, exact)
    except InfluenceError as error:
        job.progress.note(f"what the run took was not recorded for later plans: {error}")


def _settle(job: Job, bill: Bill) -> None:
    manifest = job.log.manifest
    took = {
        name: (_took(job, name, manifest.stages[name]), manifest.stages[name].up_seconds)
        for name in bill.stages
        if name in manifest.stages
    }
    bill = manifest.bill = settled(bill, took)
    for stage in bill.stages.values():
        stage.done = _effort_done(stage)
    regression, scores = bill.stages.get("regression"), bill.stages.get("scores")
    if regression is not None and scores is not None and scores.planned.rows:
        # One for each map to scores, whether the map's shards were there already or not.
        maps = scores.planned.rows / manifest.counts["rows"]
        regression.done = regression.effort * job.log.maps / maps


def _took(job: Job, name: str, record: StageRecord) -> Amounts:
    if name in DRIVER:
        sizes = result_sizes(job.config.run) if name == "selection" else {}
        written, objects = sum(sizes.values()), len(sizes)
        return Amounts(written_bytes=written, objects=objects, seconds=record.seconds)
    sizes = training_bytes(job) if name in TRAINED else _written(job, name)
    took = Amounts(
        shards=record.computed,
        rows=record.rows,
        tokens=record.tokens,
        written_bytes=sum(sizes.values()),
        objects=len(sizes),
        seconds=record.seconds,
    )
    shape = shape_of(job)
    if name in OF_RUN:
        took.shards = sum(key.startswith(f"{name}/") for key in sizes)
        took.rows = job.log.scored_rows[name]
        took.tokens = job.log.scored_tokens[name] or None
    if name in TRAINED:
        took.flops = training_flops(job, record.load)
    own = row_stage(job.config, name)
    if own is not None:
        took.flops = own.flops(job.config, shape, record.load)
    elif shape is not None and name in cost.STAGES:
        took.flops = cost.STAGES[name](job.config, shape, record.load)
    return took


def _written(job: Job, stage: str) -> dict[str, int]:
    """Bytes of the shards that this run computed, by what the store lists."""
    cache = Cache(scoring_url(job.config.run)) if stage in OF_RUN else job.cache
    return Stored(cache).sizes(sorted(job.log.computed.get(stage, ())))


def _effort_done(stage: StageBill) -> float | None:
    """What a stage did, in the units of its effort."""
    if stage.took is None or stage.took.flops is not None:
        return None if stage.took is None else stage.took.flops
    planned = stage.planned.rows
    return stage.effort * ((stage.took.rows or 0) / planned if planned else 1.0)


def measured_of(manifest: Manifest, source: str) -> Measured | None:
    """What a run says of the speed of its stages; None for one that is not done."""
    bill = manifest.bill
    if bill is None or bill.total.took is None:
        return None
    stages = {}
    for name, stage in bill.stages.items():
        record = manifest.stages.get(name)
        if record is None or not stage.done or (name in OF_RUN and not stage.shards):
            continue
        seconds = record.seconds
        if name not in DRIVER:
            seconds = record.replica_seconds - record.set_up_seconds
        if seconds > 0:
            stages[name] = MeasuredStage(
                fingerprint=record.fingerprint,
                values=record.values,
                devices=record.devices,
                effort=stage.done,
                seconds=seconds,
            )
    set_up = sum(record.set_up_seconds for record in manifest.stages.values())
    most = 1 if manifest.replicas is None else max(1, manifest.replicas.most)
    return Measured(
        source=source,
        finished=history.now() if manifest.written is None else manifest.written.isoformat(),
        replica=bill.replica,
        set_up_seconds=set_up / most if set_up else None,
        stages=stages,
    )


def _remember(job: Job, exact: int) -> None:
    """Leave the run's speeds in the cache, and what its rounds asked for."""
    manifest = job.log.manifest
    measured = measured_of(manifest, storage.absolute(job.config.run))
    if measured is None:
        return
    rounds = job.config.landmarks.choose == "certified"
    decides = rounds or not METHODS[job.config.method].draws_landmarks
    if decides and job.chosen is not None:
        names = [n for n in ("gradients", "inner_products") if n in manifest.stages]
        measured.decided = job.asked
        measured.exact = sorted({key for n in names for key in manifest.stages[n].planned})
        measured.exact_rows, measured.maps = exact, job.log.maps
    history.remember(job.config.cache_url, measured)
