"""The fine-tuning job: rows, named sets and model of a config, and the run in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from influence import storage
from influence.candidates import SourceFile, none_usable, scan_files
from influence.config import Config, ModelConfig
from influence.config_finetune import POOL
from influence.errors import InputError, ModelLoadError
from influence.finetune import finetune, full_identity
from influence.finetune_settings import FinetuneSettings
from influence.fingerprints import adapter_content, model_content
from influence.hub import resolve_revision
from influence.lease import driving
from influence.loss import REDUCTIONS
from influence.replica import (
    adapter_arguments,
    choose_device,
    load_replica,
    load_tokenizer,
    resolve_dtype,
)
from influence.tokenization import Encoded, Encoder, make_encoder
from influence.training_data import TrainingRows, encoded_chunks, read_training_rows
from influence.training_progress import TrainingProgress, Watcher
from influence.training_record import TrainingRecord, check_claim, remove_training


@dataclass(frozen=True)
class FinetuneJob:
    """All that a worker needs: rows and sets as tokens, and what to load.

    `model` is without an adapter; `adapter` is one to go on from.
    """

    model: ModelConfig
    dtype: str
    adapter: str | None
    rows: TrainingRows
    sets: dict[str, list[Encoded]]
    settings: FinetuneSettings
    identity: dict[str, Any]
    output: str


def run_finetune(config: Config, *, replace: bool = False, quiet: bool = False) -> TrainingRecord:
    """Fine-tune in this process; returns the record, also of a training that was done before.

    Raises:
        InputError: among others, several workers, or `replicas.num_gpus` above 0 and no CUDA
            device here.
        RunBusyError: another driver trains into the same output.

    Example:
        >>> trained = influence.run_finetune(config, quiet=True)
        >>> trained.evaluations[-1].step == trained.total_steps
        True
    """
    if config.finetune.workers > 1:
        raise InputError(
            f"finetune.workers: {config.finetune.workers} workers need Ray; leave --in-process "
            "out, or set finetune.workers=1"
        )
    device = choose_device(config.model.device, config.replicas.num_gpus)
    config = resolve_revision(config)
    watcher = TrainingProgress(quiet=quiet)
    job = prepare_finetune(config, watcher)
    with driving(job.output, watcher.note) as lease:
        watcher.check = lease.check
        return claim(job, watcher, replace=replace) or train(job, device, watcher)


def start_of(config: Config) -> ModelConfig:
    """The model with the adapter to go on from, if there is one."""
    section, model = config.finetune, config.model
    if section.adapter is None:
        return model
    return model.model_copy(update={"adapter": section.adapter, "adapter_revision": None})


def identity_of(config: Config) -> dict[str, Any]:
    """What is trained: model and adapter by content, dtype, attention, length limit.

    Raises:
        InputError: a dtype that is not to train in, or an adapter that is not there.
    """
    section, model = config.finetune, config.model
    dtype = resolve_dtype(section.dtype or model.dtype, config.replicas.num_gpus, model.device)
    if dtype == "float16":
        raise InputError(
            "finetune.dtype: the gradients of float16 under- and overflow; set finetune.dtype to "
            "bfloat16 or float32"
        )
    identity = {
        "model": model_content(model),
        "adapter": _adapter_content(start_of(config), own=section.adapter is not None),
        "dtype": dtype,
        "attention": model.attention,
        "max_length": section.max_length or config.data.max_length,
    }
    if config.data.loss_on != "response":
        identity["loss_on"] = config.data.loss_on
    return identity


def prepare_finetune(
    config: Config, watcher: Watcher, pool: Sequence[SourceFile] | None = None
) -> FinetuneJob:
    """Read and tokenise rows and named sets; loads no model.

    pool: the files of finetune.data, if they were scanned before.

    Raises:
        InputError: files that are not there, or in which no row can be trained on or evaluated.
    """
    section, model = config.finetune, config.model
    start, identity = start_of(config), identity_of(config)
    encode = make_encoder(load_tokenizer(model), identity["max_length"], config.data.loss_on)
    rows = _rows(config, encode, pool)
    _note_rows(watcher, rows)
    sets = _sets(config, encode, watcher)
    return FinetuneJob(
        model=model.model_copy(update={"adapter": None, "adapter_revision": None}),
        dtype=identity["dtype"],
        adapter=adapter_to_start(start),
        rows=rows,
        sets=sets,
        settings=settings_of(config),
        identity=identity,
        output=storage.absolute(section.output or storage.join(config.run, "finetune")),
    )


def claim(job: FinetuneJob, watcher: Watcher, *, replace: bool) -> TrainingRecord | None:
    """The record if this very training is done; with `replace`, another one's files are removed.

    Raises:
        InputError: another training's files are there, and not `replace`.
    """
    whole = full_identity(job.rows, job.sets, job.settings, job.identity, job.adapter)
    try:
        record = check_claim(job.output, whole)
    except InputError:
        if not replace:
            raise
        remove_training(job.output)
        return None
    if record is None or not record.done:
        return None
    watcher.note(f"done before: {job.output}")
    return record


def train(job: FinetuneJob, device: str, watcher: Watcher) -> TrainingRecord:
    """Load the model onto a device ("cpu" or "cuda") and train: one worker's part, or all of it."""
    replica = load_replica(job.model, job.dtype, device)
    for note in replica.notes:
        watcher.note(note)
    return finetune(
        replica.model,
        job.rows,
        job.sets,
        job.settings,
        job.output,
        adapter=job.adapter,
        identity=job.identity,
        watcher=watcher,
    )


def _adapter_content(start: ModelConfig, *, own: bool) -> str | None:
    if start.adapter is None:
        return None
    try:
        return adapter_content(start)
    except ModelLoadError as error:
        text = str(error)
        raise InputError(
            text.replace("model.adapter", "finetune.adapter") if own else text
        ) from None


def adapter_to_start(start: ModelConfig) -> str | None:
    """The adapter to go on from; one of the hub with its commit as a local folder."""
    arguments = adapter_arguments(start)
    if start.adapter is None or not arguments:
        return start.adapter
    from huggingface_hub import snapshot_download

    return snapshot_download(start.adapter, **arguments)


def settings_of(config: Config) -> FinetuneSettings:
    """The section `finetune`, with what other sections say of it."""
    section, reduction = config.finetune, config.gradients.reduction
    names = FinetuneSettings.__dataclass_fields__
    values = {name: getattr(section, name) for name in names if hasattr(section, name)}
    values["token_budget"] = section.token_budget or config.replicas.token_budget
    values["seed"] = config.seed % 2**32 if section.seed is None else section.seed
    # Training minimises a mean of row losses; `token_max` is of gradients only.
    values["reduction"] = reduction if reduction in REDUCTIONS else "mean"
    return FinetuneSettings(**values)


def _rows(
    config: Config, encode: Encoder, files: Sequence[SourceFile] | None = None
) -> TrainingRows:
    """What finetune.data stands for."""
    section, seed = config.finetune, settings_of(config).seed
    found = _files(config) if files is None else files
    try:
        return read_training_rows(
            found, encode, weighted=section.weights, fraction=section.fraction, seed=seed
        )
    except InputError as error:
        raise InputError(f"finetune.data: {error}") from None


def _files(config: Config) -> list[SourceFile]:
    data, limit = config.finetune.data, None
    if data is None:
        folder = storage.join(config.run, "selection")
        data = [storage.join(folder, "part-*.parquet")]
        if not any(info.url.endswith(".parquet") for info in storage.list_objects(folder)):
            raise InputError(
                f"finetune.data: {config.run} has no selection yet; run `influence select` first, "
                "or set finetune.data to `pool` or to files"
            )
    elif data == [POOL]:
        data, limit = config.data.candidates, config.data.limit
    return _scan("finetune.data", data, limit)


def _sets(config: Config, encode: Encoder, watcher: Watcher) -> dict[str, list[Encoded]]:
    """The named sets, by default the targets; rows without a loss are named and left out."""
    named = config.finetune.evaluate
    chosen: dict[str, Any] = dict(config.targets if named is None else named)
    key = "targets" if named is None else "finetune.evaluate"
    sets: dict[str, list[Encoded]] = {}
    for name, each in chosen.items():
        files = _scan(f"{key}.{name}", [each.path], each.limit)
        encoded = [row for rows in encoded_chunks(files, encode) for row in rows]
        sets[name] = [row for row in encoded if row.reason is None]
        if not sets[name]:
            raise none_usable(f"{key}.{name}", files, Counter(row.reason or "" for row in encoded))
        if left := len(encoded) - len(sets[name]):
            watcher.note(f"{name}: {left} of {len(encoded)} rows have no loss and are left out")
    return sets


def _scan(key: str, patterns: Sequence[str], limit: int | None) -> list[SourceFile]:
    try:
        return scan_files(patterns, limit)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _note_rows(watcher: Watcher, rows: TrainingRows) -> None:
    text = f"rows to train on: {len(rows.encoded)}"
    text += " with their weights" if rows.weighted else ""
    cut = sum(row.truncated for row in rows.encoded)
    text += f", {cut} of them cut at max_length" if cut else ""
    if rows.left_out:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in rows.left_out.items())
        text += f"; left out {sum(rows.left_out.values())} ({reasons})"
    watcher.note(text)
