"""Transfer: would the target model rank as the reference does? Asked on a pilot of the pool.

The pilot's rows, drawn at random among the scored ones, go through a run of their own with the
target model (RUN/transfer, on the same cache); its scores are held against the reference's. The
target model's curvature is that of the pilot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from influence import storage
from influence.candidates import SourceFile, read_rows
from influence.config import Config, CoverageConfig, TransferConfig
from influence.config_finetune import ReferenceConfig
from influence.errors import InputError
from influence.finetune_job import identity_of
from influence.fingerprints import model_values
from influence.hub import resolve_revision
from influence.intervals import spearman_interval
from influence.methods import METHODS
from influence.outputs import TRANSFER
from influence.own_training_run import Train, make_training
from influence.progress import Progress
from influence.records import Interval, Transfer, TransferColumn, to_json
from influence.replica import load_tokenizer
from influence.run_log import RunLog
from influence.sketch_noise import rank_correlation
from influence.training_kind import FINETUNE_KEY

FOLDER, PILOT = "transfer", "pilot.jsonl"


def compare_models(
    config: Config,
    files: Sequence[SourceFile],
    progress: Progress,
    select: Callable[[Config], Any],
    train: Train,
) -> None:
    """Write RUN/transfer.json, where the config names a target model.

    files: of the pool. select: runs a config. train: see `own_training_run.make_training`.
    """
    if not METHODS[config.method].reference_model:
        return
    if config.transfer.model is None:
        storage.delete(storage.join(config.run, TRANSFER))  # of an earlier result
        return
    progress.note(f"transfer: a pilot with {config.transfer.model.name}")
    positions = draw_pilot(_scored(config.run), config.transfer.pilot, config.seed)
    lines = [json.dumps(row) for row in rows_at(files, positions)]
    pilot = storage.join(config.run, FOLDER, PILOT)
    storage.put(pilot, "".join(line + "\n" for line in lines).encode())
    own = _with_own_adapter(config, progress, train)
    nested = pilot_config(own, config.run)
    select(nested)
    mine = scores_at(config.run, positions)
    theirs = scores_at(nested.run, np.arange(len(positions)))
    columns = [_column(name, mine[name], theirs[name]) for name in mine]
    document = Transfer(
        model=config.transfer.model.name,
        adapter=own.model.adapter,
        parameters=nested.gradients.parameters,
        pilot=len(positions),
        columns=columns,
    )
    storage.put(storage.join(config.run, TRANSFER), to_json(document))


def draw_pilot(scored: Bool[np.ndarray, " n"], count: int, seed: int) -> Int[np.ndarray, " k"]:
    """Random rows with a score, increasing."""
    generator = np.random.default_rng([seed, 0x7A4])
    return np.sort(generator.permutation(np.flatnonzero(scored))[:count])


def target_config(config: Config) -> Config | None:
    """The config with the target model, and how its adapter is made, in the reference's place.

    None where it names no target model.
    """
    settings = config.transfer
    if not METHODS[config.method].reference_model or settings.model is None:
        return None
    reference = ReferenceConfig(finetune=settings.finetune)  # pyright: ignore[reportCallIssue]
    return config.model_copy(update={"model": settings.model, "reference": reference})


def check_target(config: Config) -> None:
    """See that the target model is there, before anything is computed for its sake.

    Raises:
        InputError: names transfer.model or transfer.finetune.
    """
    own = target_config(config)
    if own is None:
        return
    try:
        model_values(resolve_revision(own))
        load_tokenizer(own.model)
        if own.reference.finetune is not None:
            identity_of(own.model_copy(update={"finetune": own.reference.finetune}))
    except InputError as error:
        raise type(error)(_own_keys(str(error))) from None


def _own_keys(text: str) -> str:
    """An error with the keys of this section."""
    text = FINETUNE_KEY.sub("transfer.finetune.", text)
    if text.startswith("transfer."):
        return text
    return f"transfer.{text}" if text.startswith("model.") else f"transfer: {text}"


def pilot_config(config: Config, run: str) -> Config:
    """The run of the pilot, below that of the reference; `config` has the target model.

    A model without an adapter is asked for its own weights' gradients.
    """
    folder = storage.join(run, FOLDER)
    gradients = config.gradients
    if config.model.adapter is None and gradients.parameters == "lora":
        gradients = gradients.model_copy(update={"parameters": "linear"})
    pilot = {"candidates": [storage.join(folder, PILOT)], "limit": None}
    data = config.data.model_copy(update=pilot)
    selection = config.selection.model_copy(update={"budget": "100%", "per_source": {}})
    return config.model_copy(
        update={
            "run": folder,
            "cache": config.cache_url,
            "data": data,
            "gradients": gradients,
            "selection": selection,
            "layers": "all",
            "reference": ReferenceConfig(),  # pyright: ignore[reportCallIssue]
            "coverage": CoverageConfig(),  # pyright: ignore[reportCallIssue]
            "transfer": TransferConfig(),  # pyright: ignore[reportCallIssue]
            "contamination": None,
        }
    )


def _with_own_adapter(config: Config, progress: Progress, train: Train) -> Config:
    """The config with the target model, fine-tuned on the whole pool where that is asked for."""
    own = target_config(config)
    assert own is not None
    log = RunLog.unsaved(config.run, config.method)
    try:
        return make_training(resolve_revision(own), progress, log, train)[0]
    except InputError as error:
        raise type(error)(_own_keys(str(error))) from None


def _column(
    name: str, mine: Float[np.ndarray, " k"], other: Float[np.ndarray, " k"]
) -> TransferColumn:
    both = np.isfinite(mine) & np.isfinite(other)
    count = int(both.sum())
    rho = rank_correlation(mine[both], other[both]) if count > 1 else None
    if rho is None or not np.isfinite(rho):
        return TransferColumn(name=name, rows=count)
    low, high = spearman_interval(float(rho), count)
    return TransferColumn(
        name=name, rows=count, spearman=Interval(value=float(rho), low=low, high=high)
    )


def _scored(run: str) -> Bool[np.ndarray, " n"]:
    """Which rows of the pool have a score."""
    parts = [_numbers(part, "score") for part in _parts(run, lambda name: name == "score")]
    return np.isfinite(np.concatenate(parts))


def scores_at(run: str, positions: Int[np.ndarray, " k"]) -> dict[str, Float[np.ndarray, " k"]]:
    """The scores of some rows (increasing) by target and group, NaN for none."""
    found: dict[str, list[np.ndarray]] = {}
    start = 0
    for part in _parts(run, lambda name: name.startswith("score.")):
        own = positions[(positions >= start) & (positions < start + part.num_rows)] - start
        for column in part.column_names:
            name = column.removeprefix("score.")
            found.setdefault(name, []).append(_numbers(part, column)[own])
        start += part.num_rows
    return {name: np.concatenate(values) for name, values in found.items()}


def _parts(run: str, wanted: Callable[[str], bool]) -> Iterator[pa.Table]:
    """Some columns of the parts of RUN/scores, in order."""
    for info in storage.list_objects(storage.join(run, "scores")):
        with pq.ParquetFile(storage.open_input(info.url)) as part:
            yield part.read(columns=[name for name in part.schema_arrow.names if wanted(name)])


def _numbers(part: pa.Table, column: str) -> Float[np.ndarray, " n"]:
    return part.column(column).to_numpy().astype(np.float64)


def rows_at(files: Sequence[SourceFile], positions: Int[np.ndarray, " k"]) -> list[dict[str, Any]]:
    """The pilot's rows, with their positions for ids."""
    found, start = [], 0
    for file in files:
        own = positions[(positions >= start) & (positions < start + file.rows)]
        examples = read_rows(file, (own - start).tolist())
        for position, example in zip(own.tolist(), examples, strict=True):
            messages = [{"role": m.role, "content": m.content} for m in example.messages]
            found.append({"id": str(position), "source": example.source, "messages": messages})
        start += file.rows
    return found
