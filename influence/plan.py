"""`influence plan`: what a run would take, before it takes it. Tokenises; runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from influence import cost, history
from influence.bill import planned_bill
from influence.bill_record import replicas_of, shape_of
from influence.budget import parse_budget
from influence.config import Config
from influence.cost import ReplicaMemory
from influence.embeddings import check_embedding
from influence.errors import InputError
from influence.hub import resolve_revision
from influence.local import local_execute
from influence.methods import METHODS
from influence.missing_work import first_work
from influence.model_shape import ModelShape
from influence.own_training import OwnTraining, planned_training
from influence.pipeline import catalogue, prepare
from influence.plan_notes import notes_of, unlike_replicas
from influence.plan_schemas import Bill, Measured, PlanDocument
from influence.planned_trainings import training_notes
from influence.planned_work import Work, plan_work
from influence.pool_units import contamination_units
from influence.progress import Progress
from influence.reducer import Reducer
from influence.reference import with_reference
from influence.replica import resolve_dtype
from influence.result_bytes import selected_rows
from influence.run_log import RunLog
from influence.schemas import FORMAT_VERSION
from influence.speeds import Speeds


@dataclass
class Plan:
    """What `influence plan` prints."""

    config: Config
    counts: dict[str, Any]
    work: Work
    bill: Bill
    shape: ModelShape | None
    selected: str
    memory: ReplicaMemory | None = None
    notes: list[str] = field(default_factory=list)

    def document(self) -> PlanDocument:
        """The same for programs."""
        memory = None
        if self.memory is not None:
            memory = {**asdict(self.memory), "total": self.memory.total}
        return PlanDocument(
            format_version=FORMAT_VERSION,
            run=self.config.run,
            cache=self.config.cache_url,
            method=self.config.method,
            counts=self.counts,
            selection=self.selected,
            bill=self.bill,
            memory=memory,
            coverage=[] if self.shape is None else self.shape.coverage,
            notes=self.notes,
        )


def make_plan(config: Config, asked: Sequence[Measured] = ()) -> Plan:
    """Scan and tokenise (committing catalogue shards), then count every stage's work.

    Speeds that are `asked` for come before those that runs left in the cache.
    """
    config = resolve_revision(with_reference(config))
    with planned_training(config) as (ready, own):
        return _plan(ready, own, asked, config)


def _plan(
    config: Config, own: OwnTraining | None, asked: Sequence[Measured], written: Config
) -> Plan:
    log = RunLog.unsaved(config.run, config.method)
    job = prepare(config, Progress(), log, own)
    job.execute = local_execute(config, job.watch)
    reducer = Reducer(config)
    counts = reducer.load_catalogue(*catalogue(job), contamination_units(job))
    runs = history.recall(config.cache_url)
    shape, replicas = shape_of(job), replicas_of(job)
    rounds = history.decided(job, runs)
    work = plan_work(job, reducer, counts, shape, replicas, rounds)
    work.stages = {**{first.name: first for first in first_work(job, replicas)}, **work.stages}
    speeds = Speeds(config, shape, job.fingerprints, runs, asked)
    bill = planned_bill(work.stages.values(), config, speeds, replicas)
    plan = Plan(config, counts, work, bill, shape, _selected(config, counts))
    if shape is not None and METHODS[config.method].needs_gradients:
        plan.memory = _memory(config, shape, counts)
        plan.notes += _refusals(config, shape, work, counts)
    plan.notes += notes_of(job, work, [*runs, *asked])
    plan.notes += training_notes(written, reducer, counts, speeds)
    plan.notes += [unlike for each in asked if (unlike := unlike_replicas(config, each))]
    return plan


def _selected(config: Config, counts: dict[str, Any]) -> str:
    budget = parse_budget(config.selection.budget)
    rows = selected_rows(config.selection.budget, counts)
    if budget.tokens is not None:
        return f"{budget.tokens:,} tokens, about {rows:,} of {counts['scored']:,} rows"
    if budget.proponents is not None:
        return f"{budget.proponents:.4g} of the proponents, which the scores tell"
    return f"{rows:,} of {counts['scored']:,} rows"


def _memory(config: Config, shape: ModelShape, counts: dict[str, Any]) -> ReplicaMemory:
    dtype = resolve_dtype(config.model.dtype, config.replicas.num_gpus, config.model.device)
    share = counts["response_tokens"] / max(1, counts["tokens"])
    columns = sum(target["columns"] for target in counts["targets"].values())
    return cost.replica_memory(config, shape, dtype, share, columns)


def _refusals(config: Config, shape: ModelShape, work: Work, counts: dict[str, Any]) -> list[str]:
    """What would stop the run: blocks that the model has not, vectors that do not fit."""
    found = []
    vectors = [] if work.exact is None else [u for us in work.exact.vectors.values() for u in us]
    try:
        check_embedding(config, shape)
        cost.check_vector_bytes(config, shape)
        if vectors:
            cost.check_target_bytes(config, shape, len(vectors))
        if (check := METHODS[config.method].check_bytes) is not None:
            check(config, shape, sum(target["columns"] for target in counts["targets"].values()))
    except InputError as error:
        found.append(f"the run will be refused: {error}")
    return found
