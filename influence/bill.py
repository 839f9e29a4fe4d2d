"""The bill: seconds, GPU-hours and money of every stage, before a run and after it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import ceil

from influence import cost
from influence.config import Config
from influence.plan_schemas import COMPARED, Amounts, Bill, StageBill
from influence.quantities import Quantities, StageWork
from influence.row_stages import row_stage
from influence.speeds import Speed, Speeds, kind_of

_COUNTS = ("shards", "rows", "tokens", "flops", "read_bytes", "written_bytes", "objects")
_SUMMED = (*_COUNTS, "seconds", "gpu_hours", "node_hours", "money")


def replicas_at_once(config: Config) -> int:
    """Replicas that work at once at most: without a cluster, as many as this machine's cores hold.

    GPUs are taken to be elsewhere: a plan is often made where there is none.
    """
    replicas = config.replicas
    if replicas.num_gpus > 0 or os.environ.get("RAY_ADDRESS"):
        return replicas.max
    return max(1, min(replicas.max, (os.cpu_count() or 1) // replicas.num_cpus))


def planned_bill(
    stages: Iterable[StageWork], config: Config, speeds: Speeds, replicas: int
) -> Bill:
    """Put prices and speeds to what there is to do."""
    stages = list(stages)
    of_replicas = [s for s in stages if s.workers is None]
    most = max((e.bundles for s in of_replicas for e in (s.least, s.most) if e), default=0)
    at_once = max(1, min(replicas, max(most, config.replicas.min)))
    prices = config.prices
    bill = Bill(
        replica=kind_of(config),
        replicas=at_once,
        nodes=ceil(at_once / prices.replicas_per_node),
        node_hour=prices.node_hour,
        currency=prices.currency,
    )
    for work in stages:
        speed, set_up = speeds.of(work), 0.0
        if work.workers is not None:
            set_up = speeds.set_up()[0]
        most = 0 if work.most is None else work.most.bundles
        models = work.name in cost.STAGES or row_stage(config, work.name) is not None
        begins = models and max(work.least.bundles, most) > 0
        if begins and not bill.set_up:
            bill.set_up_seconds, bill.set_up = speeds.set_up()
            set_up = bill.set_up_seconds
        bill.stages[work.name] = StageBill(
            shards=work.shards,
            cached=work.cached,
            planned=_amounts(work, work.least, speed, set_up, bill),
            at_most=None if work.most is None else _amounts(work, work.most, speed, set_up, bill),
            speed=speed.source if work.least.effort or work.most else "",
            effort=work.least.effort,
        )
    bill.total = _total(bill)
    return bill


def _amounts(work: StageWork, what: Quantities, speed: Speed, set_up: float, bill: Bill) -> Amounts:
    seconds, at_once = what.effort / speed.per_second, bill.replicas
    if work.workers is not None:
        at_once = work.workers
        seconds = set_up + seconds / at_once if what.bundles else 0.0
    elif work.replicas:
        # The last shards keep some of the replicas waiting.
        rounds = ceil(what.bundles / bill.replicas)
        each = speed.shard + seconds / max(1, what.bundles)
        seconds = set_up + each * rounds if what.bundles else 0.0
    amounts = Amounts(
        shards=what.shards if work.replicas else None,
        rows=what.rows if work.replicas else None,
        tokens=what.tokens,
        flops=what.flops,
        read_bytes=what.read,
        written_bytes=what.written,
        objects=what.objects,
        seconds=seconds,
    )
    return amounts.model_copy(update=_priced(bill, seconds * at_once))


def _priced(bill: Bill, up_seconds: float) -> dict[str, float | None]:
    """Hours and money of replicas that are up for so long, at work or waiting for the driver."""
    nodes = up_seconds / 3600 * bill.nodes / bill.replicas
    return {
        "gpu_hours": up_seconds / 3600 * bill.replica.num_gpus,
        "node_hours": nodes,
        "money": None if bill.node_hour is None else nodes * bill.node_hour,
    }


def settled(bill: Bill, took: Mapping[str, tuple[Amounts, float]]) -> Bill:
    """The bill with what every stage took, and the seconds that its replicas were up.

    A stage that was not planned (there is none today) would stand beside an empty plan.
    """
    done = bill.model_copy(deep=True)
    for name, (amounts, up_seconds) in took.items():
        stage = done.stages.setdefault(name, StageBill())
        stage.took = amounts.model_copy(update=_priced(bill, up_seconds))
        stage.ratio = ratios(stage)
    done.total = _total(done)
    return done


def ratios(stage: StageBill) -> dict[str, float]:
    """took / planned of everything that both count; see `StageBill.ratio`."""
    found: dict[str, float] = {}
    for name in COMPARED:
        low, took = getattr(stage.planned, name), getattr(stage.took, name, None)
        if low is None or took is None:
            continue
        high = low if stage.at_most is None else getattr(stage.at_most, name)
        nearest = low if took < low else high if high is not None and took > high else took
        if nearest > 0:
            found[name] = took / nearest
    return found


def _total(bill: Bill) -> StageBill:
    stages = list(bill.stages.values())
    total = StageBill(
        shards=sum(s.shards for s in stages),
        cached=sum(s.cached for s in stages),
        planned=_sum(s.planned for s in stages),
    )
    if any(s.at_most is not None for s in stages):
        total.at_most = _sum(s.at_most or s.planned for s in stages)
    if any(s.took is not None for s in stages):
        total.took = _sum(_planned_part(s, s.took) for s in stages if s.took is not None)
        total.ratio = ratios(total)
    return total


def _planned_part(stage: StageBill, took: Amounts) -> Amounts:
    """Without what the plan did not count, or the total's ratio would be of unlike sums."""
    unplanned = [name for name in _COUNTS if getattr(stage.planned, name) is None]
    return took.model_copy(update=dict.fromkeys(unplanned))


def _sum(parts: Iterable[Amounts]) -> Amounts:
    """Sums of what is counted; null where no part counts it."""
    listed = list(parts)
    values = {}
    for name in _SUMMED:
        counted = [v for v in (getattr(part, name) for part in listed) if v is not None]
        values[name] = sum(counted) if counted else None
    hours = ("seconds", "gpu_hours", "node_hours")
    return Amounts(**{**values, **{name: values[name] or 0.0 for name in hours}})
