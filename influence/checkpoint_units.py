"""Gradients at several checkpoints of a warm-up: their names in the cache, and their units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from influence import storage
from influence.checkpoints import epoch_folder
from influence.config import Config
from influence.errors import InputError
from influence.fingerprints import Fingerprint, fingerprint, optimizer_values, stage_fingerprints
from influence.job import Job
from influence.methods import METHODS
from influence.optimizer_use import TARGET_GRADIENTS
from influence.own_training import epochs_kept
from influence.records import EpochCheckpoint, OwnTrainingRecord
from influence.units import ExactUnits, Unit, range_units
from influence.warmup import WARMUP

GRADIENTS = "gradients"


@dataclass(frozen=True)
class CheckpointUnits:
    """The units at one checkpoint: AdamW's updates of all candidates, the targets' gradients."""

    folder: str
    units: ExactUnits


def checkpoint_folders(config: Config) -> list[str]:
    """Where a job's warm-up left its epochs' checkpoints; the config is the one with its result."""
    assert config.warmup is not None
    assert config.model.adapter is not None
    return [
        storage.join(config.model.adapter, epoch_folder(k + 1))
        for k in range(epochs_kept(config.warmup))
    ]


def checkpoint_records(config: Config) -> list[EpochCheckpoint]:
    """What the warm-up says of them: their steps and learning rates.

    Raises:
        InputError: no finished warm-up with checkpoints is there.
    """
    adapter = config.model.adapter or ""
    marker = storage.load(storage.join(adapter, WARMUP.marker))
    found = [] if marker is None else OwnTrainingRecord.model_validate_json(marker[0]).checkpoints
    if len(found) != len(checkpoint_folders(config)):
        raise InputError(
            f"{adapter}: expected {len(checkpoint_folders(config))} checkpoints of a finished "
            f"warm-up, found {len(found)}; run `influence select` again, which makes it"
        )
    return found


def rate_weights(records: Sequence[EpochCheckpoint]) -> list[float]:
    """The checkpoints' mean learning rates, as parts of their sum."""
    rates = [each.learning_rate for each in records]
    return [rate / sum(rates) for rate in rates]


def checkpoint_fingerprints(config: Config, template: str) -> list[dict[str, Fingerprint]]:
    """Of the candidates' updates and the targets' gradients, at every checkpoint.

    Both know the checkpoint by its adapter's content; updates also by the optimiser's state.
    """
    found = []
    for folder in checkpoint_folders(config):
        model = config.model.model_copy(update={"adapter": folder, "adapter_revision": None})
        optimizer = config.optimizer.model_copy(update={"kind": "adamw", "state": folder})
        own = config.model_copy(update={"model": model, "optimizer": optimizer})
        plain = stage_fingerprints(own, template)[GRADIENTS]
        updates = {**plain.values, **optimizer_values(own), "update": "adamw"}
        found.append({GRADIENTS: fingerprint(updates), TARGET_GRADIENTS: plain})
    return found


def fingerprints_of(job: Job) -> list[Fingerprint]:
    """Of all stages of a job; at checkpoints those of each."""
    found = list(job.fingerprints.values())
    if METHODS[job.config.method].at_checkpoints:
        template = job.fingerprints["catalogue"].values["template"]
        for each in checkpoint_fingerprints(job.config, template):
            found += each.values()
    return found


def checkpoint_units(job: Job) -> list[CheckpointUnits]:
    """The units of every row at every checkpoint; the job's records of the stages name them all."""
    config, rows = job.config, job.config.replicas.gradient_rows_per_shard
    prints = checkpoint_fingerprints(config, job.fingerprints["catalogue"].values["template"])
    for stage in (GRADIENTS, TARGET_GRADIENTS):
        every = [each[stage].hex for each in prints]
        job.fingerprints[stage] = fingerprint({**prints[-1][stage].values, "checkpoints": every})
    found = []
    for folder, own in zip(checkpoint_folders(config), prints, strict=True):

        def units(stage: str, files: Any, folder: str = folder, own: Any = own) -> list[Unit]:
            ranges = range_units(stage, own[stage].hex, files, rows)
            return [replace(unit, checkpoint=folder) for unit in ranges]

        targets = {n: units(TARGET_GRADIENTS, files) for n, files in job.target_files.items()}
        candidates = units(GRADIENTS, job.files)
        found.append(CheckpointUnits(folder, ExactUnits(candidates, targets, {})))
    return found
