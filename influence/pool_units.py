"""The units of stages that take all rows of the pool, or of a target, in ranges."""

from __future__ import annotations

from dataclasses import replace

from influence.contamination_units import STAGE, guards_of
from influence.job import Job
from influence.units import Unit, range_units


def catalogue_units(job: Job) -> tuple[list[Unit], dict[str, list[Unit]]]:
    """The catalogue's units: (pool, per target)."""
    digest = job.fingerprints["catalogue"].hex
    rows = job.config.replicas.rows_per_shard
    pool = range_units("catalogue", digest, job.files, rows)
    targets = {
        name: range_units(
            "catalogue", digest, files, rows, group_by=job.config.targets[name].group_by
        )
        for name, files in job.target_files.items()
    }
    return pool, targets


def row_units(job: Job, stage: str) -> list[Unit]:
    """A stage of every candidate."""
    rows = job.config.replicas.rows_per_shard
    return range_units(stage, job.fingerprints[stage].hex, job.files, rows)


def target_row_units(job: Job, stage: str) -> dict[str, list[Unit]]:
    """A stage of every target's rows."""
    digest, rows = job.fingerprints[stage].hex, job.config.replicas.rows_per_shard
    return {
        name: range_units(stage, digest, files, rows) for name, files in job.target_files.items()
    }


def contamination_units(job: Job) -> list[Unit]:
    """Every candidate against the targets' texts; no units where that is switched off."""
    if STAGE not in job.fingerprints:
        return []
    guards = tuple(guards_of(job.target_files, job.against))
    rows = job.config.replicas.rows_per_shard
    units = range_units(STAGE, job.fingerprints[STAGE].hex, job.files, rows)
    return [replace(unit, against=guards) for unit in units]


def embedding_units(job: Job) -> list[Unit]:
    """Embeddings of every candidate."""
    return row_units(job, "embedding")


def rds_target_units(job: Job) -> dict[str, list[Unit]]:
    """Embeddings of every target's rows, which RDS+ compares with."""
    return target_row_units(job, "embedding")
