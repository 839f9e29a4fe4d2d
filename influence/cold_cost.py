"""What a selection takes with an empty cache, whatever the cache held when it was made.

A run's own record counts what it computed, which is little where others were there before. Its
units, cached ones among them, say what it needs: their operations follow from the catalogue, and
their time from the speed at which runs on the same cache computed such shards (`history/`). Steps
that every run makes for itself (regressions, maps to scores, choosing the rows) are as recorded.
Loading models is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from influence import history
from influence.bill_record import measured_of, shape_of
from influence.input_bytes import file_bytes
from influence.job import Job
from influence.load import Load
from influence.missing_work import MissingWork
from influence.own_training import STAGES as TRAINED
from influence.own_training_work import training_work
from influence.quantities import OF_RUN, Quantities, StageWork
from influence.records import StageRecord
from influence.speeds import BYTES_PER_SECOND, Speeds
from influence.units import Unit, bundled


class StageCost(BaseModel):
    """One stage, all of its shards computed.

    Attributes:
        flops: of the models; 0 where none is at work.
        seconds: of one replica, or of the driver for its own steps.
        source: what the seconds are from: `recorded`, or the run whose speed it is.
    """

    flops: float = 0.0
    seconds: float
    source: str


class ColdCost(BaseModel):
    """A selection's cost by stage."""

    stages: dict[str, StageCost]

    @property
    def flops(self) -> float:
        """Operations of the models."""
        return sum(stage.flops for stage in self.stages.values())

    @property
    def seconds(self) -> float:
        """Of one replica and the driver, one after the other."""
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def assumed(self) -> list[str]:
        """Stages whose speed nobody has measured."""
        return [name for name, s in self.stages.items() if s.source.startswith("assumed")]


def cold_cost(job: Job, reduce: Any) -> ColdCost:
    """The cost of a select job that is done.

    job: its log knows the units of every stage. reduce: its reducer, with the catalogue.
    """
    shape, manifest = shape_of(job), job.log.manifest
    own = measured_of(manifest, job.config.run)
    runs = history.recall(job.config.cache_url)
    speeds = Speeds(job.config, shape, job.fingerprints, [*([own] if own else []), *runs])
    price = MissingWork(job, reduce, shape, 1).price
    stages = {}
    for name, record in manifest.stages.items():
        units = job.log.units_without_cache(name)
        if name in TRAINED:
            stages[name] = _training(job, reduce, name)
        elif name in BYTES_PER_SECOND:
            stages[name] = _at_speed(_reading(job, name, units), speeds)
        elif (flops := _operations(price, name, record, _load(reduce, units))) is None:
            stages[name] = _recorded(name, record, len(units), 0.0)
        elif units:
            work = Quantities(shards=len(units), flops=flops, effort=flops)
            print_ = job.fingerprints[name]
            stages[name] = _at_speed(StageWork(name, work, fingerprint=print_), speeds)
        else:
            stages[name] = _recorded(name, record, 0, flops)
    return ColdCost(stages=stages)


def _training(job: Job, reduce: Any, name: str) -> StageCost:
    """As whoever made it recorded it, in seconds of its workers."""
    use = getattr(job.log.manifest, name)
    assert use is not None
    assert job.own_training is not None
    anew = replace(job, own_training=replace(job.own_training, there=False))
    flops = training_work(anew, reduce).least.flops or 0.0
    return StageCost(
        flops=flops, seconds=use.record.seconds * use.record.workers, source="recorded"
    )


def _reading(job: Job, name: str, units: Sequence[Unit]) -> StageWork:
    """Of stages that read rows, and run no model on them."""
    effort = sum(file_bytes(unit.file) * unit.count / unit.file.total_rows for unit in units)
    return StageWork(name, Quantities(effort=effort), fingerprint=job.fingerprints[name])


def _load(reduce: Any, units: Sequence[Unit]) -> Load | None:
    """Of all units; those that share a pass are counted once, as `influence plan` does."""
    if not units:
        return None
    bundles = bundled(units)
    total = Load()
    loads = reduce.loads_of([bundle.units[0] for bundle in bundles])
    for bundle, each in zip(bundles, loads, strict=True):
        columns = sum(len(unit.needs) for unit in bundle.units)
        total += replace(each.load, products=columns * each.load.rows)
    return total


def _operations(
    price: Callable[[str, Load], float], name: str, record: StageRecord, load: Load | None
) -> float | None:
    """Of a load, or of what the run itself computed; None of a stage where no model is at work."""
    if load is None and not record.load.tokens:
        return None
    try:
        return price(name, record.load if load is None else load)
    except KeyError:
        return None


def _at_speed(work: StageWork, speeds: Speeds) -> StageCost:
    speed = speeds.of(work)
    return StageCost(
        flops=work.least.flops or 0.0,
        seconds=work.least.effort / speed.per_second,
        source=speed.source,
    )


def _recorded(name: str, record: StageRecord, shards: int, flops: float) -> StageCost:
    """What every run does itself; of shards without a model, scaled to all of them."""
    if not shards:
        seconds = record.replica_seconds if name in OF_RUN else record.seconds
        return StageCost(flops=flops, seconds=seconds, source="recorded")
    if not record.computed:
        return StageCost(seconds=0.0, source="assumed: nothing, as all shards were there before")
    seconds = record.replica_seconds * shards / record.computed
    return StageCost(seconds=seconds, source="recorded")
