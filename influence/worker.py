"""One worker: turns a unit of work into a committed shard.

Reading and tokenising happen on the calling thread, the model runs on a thread of its own, and the
write happens on the calling thread again: with a few units in flight, the model never waits.
Knows nothing of Ray; a replica actor wraps one of these, and so does a run in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import torch

from influence import contamination_units, stages, token_units
from influence.batching import IGNORED, Batch, make_batches
from influence.cache import Cache
from influence.candidates import Example, read_examples, read_rows
from influence.checkpoint_tools import CheckpointTools
from influence.config import Config
from influence.errors import InputError, ModelLoadError
from influence.full_vectors import HESSIAN_MEMORY, full_vectors, offset_products, read_vectors
from influence.layer_choice import read_names
from influence.load import Load
from influence.replica import choose_device, load_replica, load_tokenizer, resolve_dtype
from influence.retraining_rows import STAGE as RETRAINING
from influence.row_stages import Loaded, RowStage, different_rows, row_stage
from influence.score_shards import scoring_url
from influence.scoring_units import SCORING_STAGES, ScoringUnits
from influence.stage_settings import stage_settings
from influence.stages import Toolbox, Vectors
from influence.tokenization import Encoded, make_encoder
from influence.unit_tables import row_table, target_vector_table, unique_rows, vector_table
from influence.units import FULL_VECTORS, Bundle, Unit


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit: the outcome of its commit and what it took.

    `model_seconds` are those in which the model computed the unit's vectors, and nothing else:
    `set_up_seconds` (loading the model, building engines) are not in them, and neither is
    reading, batching, packing or writing. `load` is what it computed in them.
    """

    key: str
    outcome: str
    rows: int
    tokens: int
    set_up_seconds: float
    model_seconds: float
    device: str | None
    notes: tuple[str, ...] = field(default=())
    load: Load = field(default=Load())


@dataclass(frozen=True)
class _Computed:
    """Tables of a bundle's units, seconds setting up and in the model, where, and how much."""

    tables: list[pa.Table]
    set_up: float
    model: float
    device: str
    notes: tuple[str, ...]
    load: Load = field(default=Load())
    step: tuple[str, ...] = ()  # of the optimiser's step: the same for every shard of the stage


class Worker:
    """Computes units of any stage; loads the model when the first unit needs it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = Cache(config.cache_url)
        self._encode: Any = None
        self._toolbox: Toolbox | None = None
        self._chosen: tuple[str, Toolbox] | None = None
        self._checkpoints: CheckpointTools | None = None
        self._directions: tuple[str, dict[str, torch.Tensor]] | None = None
        self._own: dict[str, Loaded] = {}
        self._load_error: ModelLoadError | None = None
        self._scoring = ScoringUnits(config, self._device)
        self._retraining: Any = None
        self._contamination = contamination_units.Contamination(config, self.cache)
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._io_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def load(self) -> None:
        """Load the model now; raises `ModelLoadError` with its cause."""
        self._model_thread.submit(self._tools).result()

    def run(self, bundle: Bundle) -> list[UnitResult]:
        """Compute and commit the units of a bundle. Safe to call from several threads at once."""
        unit = bundle.units[0]
        if unit.stage in SCORING_STAGES:
            outcome, rows = self._model_thread.submit(self._scoring.run, unit).result()
            return [UnitResult(unit.key, outcome, rows, 0, 0.0, 0.0, None)]
        if unit.stage == contamination_units.STAGE:
            outcome, rows = self._io_thread.submit(self._contamination.run, unit).result()
            return [UnitResult(unit.key, outcome, rows, 0, 0.0, 0.0, "cpu")]
        if unit.stage == token_units.STAGE:
            return [self._token_scores(unit)]
        if all(self.cache.verified(member.key) for member in bundle.units):
            # Committed since the job looked: by a replica that died before it could say so, or by
            # another job on this cache.
            return [
                UnitResult(member.key, "exists", 0, 0, 0.0, 0.0, None) for member in bundle.units
            ]
        if unit.stage == RETRAINING:
            return [self._model_thread.submit(self._retrain, unit).result()]
        examples, encoded = self._io_thread.submit(self._read, unit).result()
        tokens = sum(row.n_tokens for row in encoded if row.reason is None)
        if unit.stage == "catalogue":
            computed = _Computed([row_table(encoded)], 0.0, 0.0, "cpu", ())
        elif (own := row_stage(self.config, unit.stage)) is not None:
            computed = self._model_thread.submit(self._compute_own, own, examples, encoded).result()
        else:
            computed = self._model_thread.submit(self._compute, bundle, encoded).result()
        outcomes = []
        for member, table in zip(bundle.units, computed.tables, strict=True):
            meta = {
                "stage": member.stage,
                "fingerprint": member.fingerprint,
                "first": member.first,
                "last": member.last,
                "tokens": tokens,
                "device": computed.device,
                "notes": list(computed.notes),
                "torch": torch.__version__,
            }
            outcomes.append(self.cache.commit(member, table, meta))
        # The pass was made once: rows, tokens and time count for the first unit of the bundle.
        whole = (len(encoded), tokens, computed.set_up, computed.model)
        return [
            UnitResult(
                member.key,
                outcome,
                *(whole if member is unit else (0, 0, 0.0, 0.0)),
                computed.device,
                computed.notes + computed.step,
                computed.load if member is unit else Load(),
            )
            for member, outcome in zip(bundle.units, outcomes, strict=True)
        ]

    def close(self) -> None:
        """End the worker's threads."""
        self._model_thread.shutdown(wait=True)
        self._io_thread.shutdown(wait=True)

    def _read(self, unit: Unit) -> tuple[list[Example], list[Encoded]]:
        if self._encode is None:
            tokenizer, data = load_tokenizer(self.config.model), self.config.data
            self._encode = make_encoder(tokenizer, data.max_length, data.loss_on)
        if unit.rows is None:
            examples = read_examples(unit.file, unit.first, unit.last, unit.group_by)
            return examples, self._encode(examples)
        parts = [read_rows(part.file, part.row_numbers, part.group_by) for part in unit.parts]
        encoded = [row for part in parts for row in self._encode(part)]
        return [example for part in parts for example in part], encoded

    def _token_scores(self, unit: Unit) -> UnitResult:
        """Scores of a unit's rows by their strongest token; they belong to this run alone."""
        url = scoring_url(self.config.run)
        if Cache(url).verified(unit.key):
            return UnitResult(unit.key, "exists", 0, 0, 0.0, 0.0, None)
        _examples, encoded = self._io_thread.submit(self._read, unit).result()
        lap = _stopwatch()

        def compute() -> tuple[pa.Table, str, Load]:
            tools, key = self._tools_of(unit), unit.needs[0]
            if self._directions is None or self._directions[0] != key:
                self._directions = (key, token_units.read_directions(tools, url, key))
            directions, budget = self._directions[1], self.config.replicas.token_budget
            table = token_units.score_table(tools, directions, encoded, budget)
            columns = len(next(iter(directions.values())))
            load = load_of(make_batches(unique_rows(encoded)[1], budget), columns)
            return table, tools.replica.device_name, load

        table, device, load = self._model_thread.submit(compute).result()
        seconds = lap()
        tokens = sum(row.n_tokens for row in encoded if row.reason is None)
        outcome = Cache(url).commit(unit, table, {"stage": unit.stage, "device": device})
        rows = table.num_rows
        return UnitResult(unit.key, outcome, rows, tokens, 0.0, seconds, device, load=load)

    def _retrain(self, unit: Unit) -> UnitResult:
        if self._retraining is None:
            from influence.retraining_work import RetrainingUnits  # it knows of training's display

            self._retraining = RetrainingUnits(
                self.config, lambda: self._tools().replica, self._device
            )
        return UnitResult(unit.key, **vars(self._retraining.run(unit)))

    def _device(self) -> str:
        """The device of this replica; on a CPU with as many threads as the config gives it."""
        device = choose_device(self.config.model.device, self.config.replicas.num_gpus)
        if device != "cuda":
            # The number of threads decides the order of sums: fixed by the config alone.
            torch.set_num_threads(self.config.replicas.num_cpus)
        return device

    def _tools(self) -> Toolbox:
        if self._load_error is not None:
            raise self._load_error
        if self._toolbox is None:
            config = self.config
            dtype = resolve_dtype(config.model.dtype, config.replicas.num_gpus, config.model.device)
            device = self._device()
            try:
                replica = load_replica(config.model, dtype, device)
            except ModelLoadError as error:
                self._load_error = error
                raise
            self._toolbox = Toolbox(replica, stage_settings(config))
        return self._toolbox

    def _tools_of(self, unit: Unit) -> Toolbox:
        """The toolbox; for gradients of chosen layers one that knows only those, and for a unit at
        a checkpoint one of the model there."""
        tools = self._tools()
        if self._checkpoints is None and unit.checkpoint is not None:
            self._checkpoints = CheckpointTools(tools, self.config.model.adapter)
        if self._checkpoints is not None:
            tools = self._checkpoints.at(unit.checkpoint)
        chosen = {"gradients": unit.needs, token_units.STAGE: unit.needs[1:]}.get(unit.stage)
        if not chosen:
            return tools
        (key,) = chosen
        if self._chosen is None or self._chosen[0] != key:
            names = read_names(scoring_url(self.config.run), key)
            settings = replace(tools.settings, layers=names)
            self._chosen = (key, Toolbox(tools.replica, settings))
        return self._chosen[1]

    def _compute(self, bundle: Bundle, encoded: Sequence[Encoded]) -> _Computed:
        lap = _stopwatch()
        unit = bundle.units[0]
        tools = self._tools_of(unit)
        set_up = lap()
        first_of, unique = unique_rows(encoded)
        # A target row that is there twice counts twice in the mean, as it does in a sketch.
        full = unit.stage in FULL_VECTORS
        rows = encoded if full else unique
        share = HESSIAN_MEMORY if unit.stage == "hessian_products" else 1
        batches = make_batches(rows, max(1, self.config.replicas.token_budget // share))
        lap()
        model = 0.0
        if full:
            tools.set_up(unit.stage)
            set_up += lap()
            url = scoring_url(self.config.run)
            found = full_vectors(bundle, tools, batches, encoded, self.cache, url)
            model = lap()
            tables = [target_vector_table(vector) for vector in found]
        else:
            columns: list[Vectors] | list[None] = [None] * len(bundle.units)
            if batches:
                compute = self._stage(bundle, tools)
                set_up += lap()
                columns = compute(batches)
                model = lap()
            tables = [vector_table(encoded, first_of, part) for part in columns]
        notes = (*tools.replica.notes, *tools.notes)
        notes += (tools.limit.note,) if tools.limit.note else ()
        step = tools.step_notes(unit.stage)
        columns_each = sum(len(unit.needs) for unit in bundle.units)
        load = load_of(batches, columns_each)
        return _Computed(tables, set_up, model, tools.replica.device_name, notes, load, step)

    def _compute_own(
        self, stage: RowStage, examples: Sequence[Example], encoded: Sequence[Encoded]
    ) -> _Computed:
        """A stage of the method's own (`influence.row_stages`)."""
        lap = _stopwatch()
        if stage.name not in self._own:
            self._own[stage.name] = stage.load(self.config, self._tools, self._device)
        loaded = self._own[stage.name]
        set_up = lap()
        budget = self.config.replicas.token_budget
        first_of, rows = different_rows(examples, encoded, budget)
        load = load_of(rows.batches, 0)
        lap()
        found = loaded.compute(rows) if rows.batches else None
        model, table = lap(), vector_table(encoded, first_of, found)
        return _Computed([table], set_up, model, loaded.device, loaded.notes(), load)

    def _stage(self, bundle: Bundle, tools: Toolbox) -> Callable[[list[Any]], list[Vectors]]:
        """What computes the columns of every unit from batches; all that it needs is set up."""
        stage, embedding = bundle.units[0].stage, bundle.units[0].embedding
        tools.set_up(stage, embedding)
        if stage == "embedding":
            return lambda batches: [stages.embed(tools, batches, embedding)]
        if stage in stages.VECTOR_STAGES:
            return lambda batches: [stages.gradient_vectors(tools, batches, stage)]
        if stage == "inner_products":
            keys = tuple(unit.needs for unit in bundle.units)
            widths = [len(unit.needs) for unit in bundle.units]
            device = tools.replica.device
            engine = tools.product_engine(keys, lambda: read_vectors(self.cache, keys, device))
            return lambda batches: stages.split_columns(
                stages.inner_products(tools, batches, engine), widths
            )
        if stage == "offset_products":
            return lambda batches: [offset_products(tools, batches)]
        raise InputError(f"no such stage: {stage!r}")


def load_of(batches: Sequence[Batch], columns: int) -> Load:
    """What a model computes of batches whose rows are multiplied with so many target columns."""
    load = Load()
    for batch in batches:
        lengths, rows = batch.lengths, len(batch.lengths)
        responses = int((batch.labels != IGNORED).sum())
        squares = int(lengths @ lengths)
        load += Load(rows, int(lengths.sum()), responses, squares, columns * rows)
    return load


def _stopwatch() -> Callable[[], float]:
    """A function that says how many seconds have passed since its last call."""
    last = time.monotonic()

    def lap() -> float:
        nonlocal last
        before, last = last, time.monotonic()
        return last - before

    return lap
