"""`influence plan`: what a run would take, before it takes it. Tokenises; runs no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence import cost
from influence.budget import parse_budget
from influence.catalogue import Catalogue
from influence.config import Config
from influence.cost import Load, ReplicaMemory, StageCost
from influence.errors import InputError
from influence.exact_work import ExactWork, plan_exact
from influence.fingerprints import embedding_values
from influence.hub import resolve_revision
from influence.local import local_execute
from influence.model_shape import ModelShape, model_shape
from influence.pipeline import Job, catalogue, embedding_units, prepare, rds_target_units
from influence.progress import Progress
from influence.reducer import Reducer
from influence.reference import with_reference
from influence.replica import resolve_dtype
from influence.run_log import RunLog
from influence.units import Unit

# What matrix products of this kind reach of a machine's rate for large ones: measured on
# SmolLM2-135M, whose matrices are small.
EFFICIENCY = 0.5
GPU_FLOPS = 400e12


@dataclass
class StagePlan:
    """One stage: its work, and how much of it the cache holds already.

    `missing` is the share of the rows that has to be computed; `shards` and `cached` count shards.
    """

    name: str
    load: Load
    shards: int
    cached: int
    cost: StageCost
    missing: float
    seconds: float = 0.0


@dataclass
class Plan:
    """What `influence plan` prints."""

    config: Config
    counts: dict[str, Any]
    stages: list[StagePlan]
    rate: float
    rate_is: str
    shape: ModelShape | None
    selected: str
    memory: ReplicaMemory | None = None
    notes: list[str] = field(default_factory=list)


def make_plan(config: Config) -> Plan:
    """Scan and tokenise (committing catalogue shards), then count every stage's work."""
    progress = Progress()
    config = resolve_revision(with_reference(config))
    budget = parse_budget(config.selection.budget)
    job = prepare(config, progress, RunLog.unsaved(config.run, config.method))
    job.execute = local_execute(config, job.watch)
    reducer = Reducer(config)
    counts = reducer.load_catalogue(*catalogue(job))
    if budget.tokens is not None:
        selected = f"{budget.tokens:,} tokens"
    elif budget.proponents is not None:
        selected = f"{budget.proponents:.4g} of the proponents, which the scores tell"
    else:
        rows = budget.rows or max(1, round((budget.share or 0) * counts["scored"]))
        selected = f"{min(rows, counts['scored']):,} of {counts['scored']:,} rows"
    if config.method == "random":
        return Plan(config, counts, [], 0.0, "no model runs", None, selected)
    shape = model_shape(config)
    rate, rate_is = _rate(config)
    plan = Plan(config, counts, [], rate, rate_is, shape, selected)
    _add_stages(plan, job, reducer, shape)
    if config.method in ("influence_distillation", "exact"):
        dtype = resolve_dtype(config.model.dtype, config.replicas.num_gpus, config.model.device)
        share = counts["response_tokens"] / max(1, counts["tokens"])
        columns = len(reducer.columns.columns)
        plan.memory = cost.replica_memory(config, shape, dtype, share, columns)
    return plan


def _add_stages(plan: Plan, job: Job, reducer: Reducer, shape: ModelShape) -> None:
    config, pool = plan.config, reducer.pool
    assert pool is not None  # load_catalogue has run
    everything = _load(pool, pool.eligible)
    targets = _sum([_load(c, c.eligible) for c in reducer.targets.values()])
    if config.method in ("influence_distillation", "rds"):
        load = everything if config.method != "rds" else _sum([everything, targets])
        _add(plan, job, "embedding", load, _embedding_units(job), _embedding_cost(plan, load))
    if config.method == "rds":
        return
    rows, chosen = everything, None
    if config.method == "influence_distillation":
        chosen = reducer.choose_landmarks()
        positions = [p for file, members in chosen for p in pool.positions(file, members)]
        rows = _load(pool, np.asarray(positions))
    work = plan_exact(job, reducer, chosen)
    chosen_projection = config.gradients.projection
    if chosen_projection != "exact":
        load = _sum([rows, targets])
        try:
            cost.check_vector_bytes(config, shape)
        except InputError as error:
            plan.notes.append(str(error))
        dim = config.gradients.dim
        if chosen_projection == "layerwise":
            dim = config.gradients.layer_dim
        sizes = config.gradients.side, dim
        exact_norms = config.gradients.norms == "exact"

        def price(load: Load) -> StageCost:
            return cost.gradients(shape, load, chosen_projection, *sizes, exact_norms=exact_norms)

        _add(plan, job, "gradients", load, work.units.all, price(load), work)
    else:
        vectors = [unit for members in work.vectors.values() for unit in members]
        try:
            cost.check_target_bytes(config, shape, len(vectors))
        except InputError as error:
            plan.notes.append(str(error))
        spent = cost.target_vectors(shape, targets, len(vectors))
        _add(plan, job, "target_vectors", targets, vectors, spent)

        def price(load: Load) -> StageCost:
            return cost.inner_products(shape, load, len(vectors))

        _add(plan, job, "inner_products", rows, work.units.all, price(rows), work)
    if chosen is not None and config.landmarks.choose == "certified":
        plan.notes.append(_rounds_note(plan, work.stage, rows, everything, price))
    if work.borrowed:
        plan.notes.append(
            f"{work.stage}: {work.borrowed:,} rows are read from {len(work.lenders):,} shards "
            "that were made for another choice of rows"
        )


def _rounds_note(
    plan: Plan, stage: str, first: Load, everything: Load, price: Callable[[Load], StageCost]
) -> str:
    """How many rows the rounds may add to the landmarks that were counted, and their time."""
    config = plan.config.landmarks
    most = max(0, min(config.count, everything.rows) - first.rows)
    part = most / max(1, everything.rows)
    load = Load(most, round(everything.tokens * part), round(everything.response_tokens * part))
    return (
        f"{stage}: counted are the {first.rows:,} landmarks to begin with; the rounds add what a "
        f"recall of {config.recall:g} needs, {most:,} rows at most "
        f"({_duration(price(load).flops / plan.rate)}; landmarks.count)"
    )


def _embedding_units(job: Job) -> list[Unit]:
    units = embedding_units(job)
    if job.config.method == "rds":
        units += [unit for members in rds_target_units(job).values() for unit in members]
    return units


def _embedding_cost(plan: Plan, load: Load) -> StageCost:
    assert plan.shape is not None  # this method has a model
    kind, embedding = embedding_values(plan.config)["embedding"], plan.config.embedding
    return cost.embedding(
        plan.shape, load, kind, embedding.blocks, embedding.tangents, embedding.dim
    )


def _add(
    plan: Plan,
    job: Job,
    name: str,
    load: Load,
    units: list[Unit],
    spent: StageCost,
    work: ExactWork | None = None,
) -> None:
    """Add a stage; of shards that lend rows to this choice, only those rows count as done."""
    present = job.cache.present([unit.key for unit in units])
    lenders = frozenset() if work is None else work.lenders
    to_do = sum(unit.count for unit in units if unit.key not in present)
    done = sum(unit.count for unit in units if unit.key in present and unit.key not in lenders)
    done += 0 if work is None else work.borrowed
    stage = StagePlan(name, load, len(units), len(present), spent, to_do / max(1, to_do + done))
    stage.seconds = spent.flops * stage.missing / plan.rate
    plan.stages.append(stage)


def _load(catalogue: Catalogue, positions: np.ndarray) -> Load:
    return Load(
        len(positions),
        int(catalogue.n_tokens[positions].sum()),
        int(catalogue.n_response_tokens[positions].sum()),
    )


def _sum(loads: list[Load]) -> Load:
    return Load(
        sum(load.rows for load in loads),
        sum(load.tokens for load in loads),
        sum(load.response_tokens for load in loads),
    )


def _rate(config: Config) -> tuple[float, str]:
    """Operations per second of all replicas together, and where the figure is from."""
    replicas = config.replicas
    if replicas.num_gpus > 0:
        rate = GPU_FLOPS * EFFICIENCY * replicas.num_gpus * replicas.max
        return rate, f"assumed: {replicas.max} replicas x {replicas.num_gpus:g} GPU at 200 TFLOP/s"
    cores = torch.get_num_threads()
    count = max(1, min(replicas.max, cores // replicas.num_cpus))
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.3:
        torch.mm(a, a)
        products += 1
    peak = 2.0 * 1024**3 * products / (time.perf_counter() - start)
    rate = peak * EFFICIENCY * min(1.0, count * replicas.num_cpus / cores)
    return rate, f"measured here: {peak / 1e9:.0f} GFLOP/s for large products, half of it assumed"


def print_plan(plan: Plan, console: Console) -> None:
    """Tables: the data, each stage's work, what gradients cover."""
    counts = plan.counts
    console.print(
        f"candidates: {counts['rows']:,} rows, {counts['tokens']:,} tokens "
        f"({counts['response_tokens']:,} of responses); {counts['scored']:,} to be scored, "
        f"{counts['duplicates']:,} duplicates, {counts['truncated']:,} truncated",
        highlight=False,
    )
    for reason, count in counts["reasons"].items():
        console.print(Text(f"  not scored, {reason}: {count:,}"))
    for name, target in counts["targets"].items():
        console.print(
            Text(
                f"target {name}: {target['scored']:,} of {target['rows']:,} rows, "
                f"{target['columns']:,} score column(s), {target['tokens']:,} tokens"
            )
        )
    console.print(f"selection: {plan.selected}", highlight=False)
    if plan.stages:
        console.print(_stage_table(plan))
        console.print(f"rate of the estimate: {plan.rate_is}", highlight=False)
    if plan.memory is not None:
        console.print(memory_line(plan.memory, plan.config.replicas.token_budget))
    if plan.shape is not None:
        console.print(coverage_table(plan.shape.coverage))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def memory_line(memory: ReplicaMemory, token_budget: int) -> Text:
    """What a replica needs, and for what."""
    parts = ", ".join(
        f"{name} {getattr(memory, name) / 1e9:.1f}"
        for name in ("weights", "activations", "logits", "projection", "layer")
    )
    return Text(
        f"memory of a replica, estimated for batches of {token_budget:,} tokens: "
        f"{memory.total / 1e9:.1f} GB ({parts})"
    )


def _stage_table(plan: Plan) -> Table:
    table = Table(title="work that is left" if any(s.cached for s in plan.stages) else "work")
    gpus = plan.config.replicas.num_gpus * plan.config.replicas.max
    headings = ("stage", "rows", "tokens", "shards", "cached", "TFLOP", "MB", "time")
    for heading in (*headings, *(("GPU-hours",) if gpus else ())):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in plan.stages:
        cells = [
            stage.name,
            f"{stage.load.rows:,}",
            f"{stage.load.tokens:,}",
            f"{stage.shards:,}",
            f"{stage.cached:,}",
            f"{stage.cost.flops * stage.missing / 1e12:,.1f}",
            f"{stage.cost.bytes * stage.missing / 1e6:,.1f}",
            _duration(stage.seconds),
        ]
        table.add_row(*cells, *((f"{stage.seconds * gpus / 3600:,.2f}",) if gpus else ()))
    return table


def coverage_table(rows: list[dict[str, Any]]) -> Table:
    """Which parameters the gradients cover; shares sum to 1."""
    table = Table(title="parameters that gradients are taken of")
    for heading in ("group", "parameters", "share", "rule", "attributed"):
        table.add_column(heading, justify="right" if heading in ("parameters", "share") else "left")
    for row in rows:
        table.add_row(
            Text(row["group"]),
            f"{row['parameters']:,}",
            f"{row['share']:.2%}",
            row["rule"] or "-",
            Text("yes" if row["attributed"] else f"no: {row['reason']}"),
        )
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
