"""`training.json`: what a training was of, and every step and evaluation of it."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from influence import storage
from influence.checkpoints import RESULT_FILES, Checkpoints, remove_epochs
from influence.errors import InputError
from influence.held_out import SetLoss
from influence.records import to_json
from influence.resume import changed_values

NAME = "training.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "ray")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StepRecord(_Part):
    """Some optimiser steps up to `step`: their mean loss, the last one's rate and gradient norm.

    `seconds` without evaluating and saving; `tokens` of the rows, without padding.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens: int
    seconds: float


class SetRecord(_Part):
    """See `influence.held_out.SetLoss`; what is not finite is null."""

    loss: float | None
    token_loss: float | None
    perplexity: float | None
    rows: int
    response_tokens: int

    @classmethod
    def of(cls, loss: SetLoss) -> SetRecord:
        values = (loss.loss, loss.token_loss, loss.perplexity)
        finite = [value if math.isfinite(value) else None for value in values]
        return cls(
            loss=finite[0],
            token_loss=finite[1],
            perplexity=finite[2],
            rows=loss.rows,
            response_tokens=loss.response_tokens,
        )


class EvaluationRecord(_Part):
    """The named sets after `step` steps; 0 is before the first."""

    step: int
    epoch: float
    sets: dict[str, SetRecord]


class RowsRecord(_Part):
    """The rows that were trained on, and by reason those that were not.

    `effective_rows`: (sum of weights)^2 / sum of their squares. `tokens`: of an epoch.
    """

    trained: int
    left_out: dict[str, int]
    truncated: int
    weighted: bool
    effective_rows: float
    tokens: int
    response_tokens: int


class TrainingRecord(_Part):
    """Everything in training.json.

    identity: what a training that goes on must have in common with the one that began. settings:
    all of them. seconds, tokens: sums over the steps. trainable: parameters that are trained.
    state: running, done, interrupted or failed.
    """

    format_version: int = FORMAT_VERSION
    state: str = "running"
    started: datetime
    written: datetime | None = None
    identity: dict[str, Any]
    settings: dict[str, Any]
    rows: RowsRecord
    total_steps: int
    epoch_steps: int
    trainable: int = 0
    steps: list[StepRecord] = []
    evaluations: list[EvaluationRecord] = []
    seconds: float = 0.0
    tokens: int = 0
    workers: int = 1
    device: str = ""
    versions: dict[str, str] = {}
    notes: list[str] = []

    @property
    def done(self) -> bool:
        return self.state == "done"

    def losses(self, name: str) -> list[float | None]:
        """The loss of a named set in the order of the evaluations, the first before training."""
        return [each.sets[name].loss for each in self.evaluations]


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of Python and what trains."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_record(output: str, record: TrainingRecord) -> None:
    """Write OUTPUT/training.json."""
    record.written = now()
    storage.put(storage.join(output, NAME), to_json(record))


def read_record(output: str) -> TrainingRecord | None:
    """OUTPUT/training.json, or None if there is none.

    Raises:
        InputError: a file that this version cannot read.
    """
    url = storage.join(output, NAME)
    if storage.head(url) is None:
        return None
    try:
        return TrainingRecord.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise InputError(
            f"{url}: not a record of this version ({error.error_count()} problems, first: "
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}); use another output, or "
            "--replace to begin anew"
        ) from None


def check_claim(output: str, identity: Mapping[str, Any]) -> TrainingRecord | None:
    """The record of this very training if it began here before, else None.

    Raises:
        InputError: another training's checkpoints or results are there; both values are printed.
    """
    before = read_record(output)
    if before is None:
        return None
    changes = changed_values(before.identity, dict(identity), free=())
    if not changes:
        return before
    kept = Checkpoints(output).steps()
    if not kept and not before.done:
        return None  # it ended before anything was committed
    lines = [f"{output} holds a fine-tuning with other arguments:"]
    lines += [f"  {key}: was {old!r}, now {new!r}" for key, old, new in changes]
    what = "its result" if before.done else f"its checkpoints up to step {kept[-1]}"
    lines.append(f"Use another finetune.output, or pass --replace to remove {what} and begin anew.")
    raise InputError("\n".join(lines))


def remove_training(output: str) -> None:
    """Remove what a training wrote, its record last; other files stay."""
    Checkpoints(output).prune(0)
    remove_epochs(output)
    for name in (*RESULT_FILES, NAME):
        storage.delete(storage.join(output, name))


def steps_of(history: Sequence[Mapping[str, Any]]) -> list[StepRecord]:
    """The steps out of the Trainer's log."""
    return [
        StepRecord(**{key: entry.get(key) for key in StepRecord.model_fields})  # type: ignore[arg-type]
        for entry in history
        if "loss" in entry
    ]


def evaluations_of(history: Sequence[Mapping[str, Any]]) -> list[EvaluationRecord]:
    """The evaluations out of the Trainer's log."""
    return [
        EvaluationRecord(step=entry["step"], epoch=entry["epoch"], sets=entry["evaluation"])
        for entry in history
        if "evaluation" in entry
    ]
