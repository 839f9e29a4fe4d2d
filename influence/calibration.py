"""How fast this machine computes a config's stages, from a few rows: `influence plan --measure`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from influence import cost, history, stages
from influence.batching import Batch, make_batches
from influence.checkpoint_tools import CheckpointTools
from influence.checkpoint_units import checkpoint_fingerprints, checkpoint_folders
from influence.config import Config
from influence.embedding_kind import named
from influence.embedding_plan import dearest
from influence.errors import InputError
from influence.fingerprints import stage_fingerprints
from influence.hub import resolve_revision
from influence.load import Load
from influence.methods import METHODS
from influence.model_shape import ModelShape, model_shape
from influence.numerics import spread_rows
from influence.optimizer_use import TARGET_GRADIENTS
from influence.own_training import planned_training
from influence.plan_schemas import Measured, MeasuredStage
from influence.reference import with_reference
from influence.replica import choose_device, load_replica, load_tokenizer, resolve_dtype
from influence.row_stages import Rows, RowStage, row_stage
from influence.speeds import kind_of
from influence.stage_settings import stage_settings
from influence.stages import Toolbox
from influence.tokenization import Encoded, template_fingerprint
from influence.worker import load_of

Compute = Callable[[Sequence[Encoded]], object]
SOURCE = "plan --measure"


def measure_speeds(config: Config, count: int) -> Measured:
    """Load the model as a replica does, and time every stage of the config on `count` candidates.

    The rows are spread over the lengths of the first rows that can be scored; each stage runs on
    the shortest of them first, so that what is done once is not timed.

    Raises:
        InputError: a method without a model, no row that can be scored, or `replicas.num_gpus`
            above 0 and no CUDA device here.
        ModelLoadError: the model cannot be loaded.
    """
    if not METHODS[config.method].runs_model:
        raise InputError(
            f"--measure: method {config.method} runs no model; there is nothing to measure"
        )
    with planned_training(resolve_revision(with_reference(config))) as (ready, _own):
        return _measured(ready, count)


def _measured(config: Config, count: int) -> Measured:
    rows, begun = spread_rows(config, count), time.monotonic()
    shape = model_shape(config)
    if config.embedding.kind == "auto":
        config = named(config, dearest(config, shape))
    device = choose_device(config.model.device, config.replicas.num_gpus)
    if device == "cpu":
        torch.set_num_threads(config.replicas.num_cpus)
    dtype = resolve_dtype(config.model.dtype, config.replicas.num_gpus, config.model.device)
    tools = Toolbox(load_replica(config.model, dtype, device), stage_settings(config))
    template = template_fingerprint(load_tokenizer(config.model))
    prints = stage_fingerprints(config, template)
    if METHODS[config.method].at_checkpoints:
        tools = CheckpointTools(tools, config.model.adapter).at(checkpoint_folders(config)[0])
        prints |= checkpoint_fingerprints(config, template)[0]
    measured = Measured(source=SOURCE, finished=history.now(), replica=kind_of(config))
    budget = config.replicas.token_budget
    seconds = {}
    for name, compute in stage_runners(config, tools).items():
        if row_stage(config, name) is None:
            tools.set_up(name)
        compute(rows[:1])
        start = time.monotonic()
        compute(rows)
        seconds[name] = time.monotonic() - start
    measured.set_up_seconds = time.monotonic() - begun - sum(seconds.values())
    for name, spent in seconds.items():
        load = load_of(make_batches(rows, budget), int(name == "inner_products"))
        covered = prints.get(name, prints["target_vectors"])
        measured.stages[name] = MeasuredStage(
            fingerprint=covered.hex,
            values=covered.values,
            devices=[tools.replica.device_name],
            effort=_effort(config, shape, name, load),
            seconds=spent,
        )
    return measured


def _effort(config: Config, shape: ModelShape, name: str, load: Load) -> float:
    own = row_stage(config, name)
    compute = cost.STAGES[name] if own is None else own.flops
    return compute(config, shape, load)


def _runner(stage: RowStage, config: Config, tools: Toolbox) -> Compute:
    loaded = stage.load(config, lambda: tools, lambda: tools.replica.device.type)
    budget = config.replicas.token_budget
    return lambda rows: loaded.compute(Rows(rows, (), budget))


def stage_runners(config: Config, tools: Toolbox) -> dict[str, Compute]:
    """What computes some rows, for every stage that the config's method has."""

    def batches(rows: Sequence[Encoded]) -> list[Batch]:
        return make_batches(rows, config.replicas.token_budget)

    def vector(rows: Sequence[Encoded]) -> dict[str, Tensor]:
        return stages.target_vector(tools, batches(rows), [str(row.row) for row in rows])[0]

    found: dict[str, Compute] = {}
    for stage in METHODS[config.method].stages:
        if not stage.reads_texts:
            found[stage.name] = _runner(stage, config, tools)
    if METHODS[config.method].embeds:
        found["embedding"] = lambda rows: stages.embed(tools, batches(rows))
    if not METHODS[config.method].needs_gradients:
        return found
    if config.gradients.projection != "exact":
        found["gradients"] = lambda rows: stages.gradient_vectors(tools, batches(rows))
        if tools.settings.scaled or tools.settings.updates:
            found[TARGET_GRADIENTS] = lambda rows: stages.gradient_vectors(
                tools, batches(rows), TARGET_GRADIENTS
            )
        return found
    kept: dict[str, list[Tensor]] = {}

    def target(rows: Sequence[Encoded]) -> None:
        kept.update({name: [value[None].float()] for name, value in vector(rows).items()})

    def products(rows: Sequence[Encoded]) -> object:
        engine = tools.product_engine(((SOURCE,),), lambda: kept)
        return stages.inner_products(tools, batches(rows), engine)

    return {**found, "target_vectors": target, "inner_products": products}
