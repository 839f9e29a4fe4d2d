"""Which shards hold the vectors that an export is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from influence.candidates import SourceFile
from influence.checkpoint_units import checkpoint_units
from influence.checkpoints import epoch_folder
from influence.embedding_choice import take_embedding
from influence.errors import InputError
from influence.exact_work import plan_exact
from influence.in2core import keep_layers
from influence.methods import METHODS
from influence.optimizer_use import TARGET_GRADIENTS
from influence.pipeline import Job, embedding_units, rds_target_units
from influence.resume import changed_values
from influence.run_log import read_manifest
from influence.units import Unit


@dataclass(frozen=True)
class Source:
    """One shard to export: whose rows it has, their file, its key.

    checkpoint: the folder for what there is at a checkpoint.
    """

    of: str
    file: SourceFile
    key: str
    checkpoint: str | None = None

    @property
    def folder(self) -> str:
        """Where its rows go, below the export's folder."""
        return self.of if self.checkpoint is None else f"{self.checkpoint}/{self.of}"


def export_sources(job: Job, stage: str, command: str, partial: bool) -> list[Source]:
    """The shards of a stage that the config's job has, in the order of the export.

    `command` and `partial` as in `influence.vector_export.export_vectors`.

    Raises:
        InputError: what only a run knows, its manifest does not say.
    """
    if stage == "embedding":
        if job.config.method == "influence_distillation" and job.config.embedding.kind == "auto":
            _take_recorded_embedding(job, command)
        targets = rds_target_units(job) if METHODS[job.config.method].embeds_targets else {}
        return [*_of_units("candidates", embedding_units(job)), *_of_targets(targets)]
    if job.config.layers == "auto":
        _keep_recorded_layers(job, command)
    if METHODS[job.config.method].at_checkpoints:
        return list(_of_checkpoints(job))
    if not METHODS[job.config.method].draws_landmarks:
        units = plan_exact(job, None, None).units
        return [*_of_units("candidates", units.candidates), *_of_targets(units.targets)]
    return _of_run(job, stage, command, partial)


def _keep_recorded_layers(job: Job, command: str) -> None:
    manifest = read_manifest(job.config.run)
    if manifest is None or manifest.layers is None:
        raise InputError(
            f"{job.config.run}: no run that has chosen its layers (layers: auto); `{command}` does"
        )
    keep_layers(job, manifest.layers)


def _take_recorded_embedding(job: Job, command: str) -> None:
    manifest = read_manifest(job.config.run)
    if manifest is None or manifest.embedding is None:
        raise InputError(
            f"{job.config.run}: no run that has chosen its embedding (embedding.kind: auto); "
            f"`{command}` does"
        )
    take_embedding(job, manifest.embedding)


def _of_units(folder: str, units: Iterable[Unit]) -> list[Source]:
    return [Source(folder, unit.file, unit.key) for unit in units]


def _of_targets(targets: dict[str, list[Unit]]) -> Iterator[Source]:
    for name, units in targets.items():
        yield from _of_units(f"targets/{name}", units)


def _of_checkpoints(job: Job) -> Iterator[Source]:
    """Below a folder for each checkpoint: the candidates' updates, and the targets' gradients."""
    for number, each in enumerate(checkpoint_units(job)):
        parts = [*_of_units("candidates", each.units.sketches), *_of_targets(each.units.targets)]
        for source in parts:
            yield replace(source, checkpoint=epoch_folder(number + 1))


def _of_run(job: Job, stage: str, command: str, partial: bool) -> list[Source]:
    """The shards that the config's run names in its manifest: which rows it chose, only it knows.

    Raises:
        InputError: no run, one with other settings, or (unless `partial`) one that is not done.
    """
    run, wanted = job.config.run, job.fingerprints[stage]
    manifest = read_manifest(run)
    record = None if manifest is None else manifest.stages.get(stage)
    if manifest is None or record is None:
        raise InputError(
            f"{run}: no run that has {stage}; which rows get some is chosen by a run: `{command}`"
        )
    if record.fingerprint != wanted.hex:
        changes = "; ".join(
            f"{key}: {before!r} there, {now!r} now"
            for key, before, now in changed_values(record.values, wanted.values)
        )
        raise InputError(f"{run}: its {stage} are of other settings: {changes}")
    if manifest.state != "done" and not partial:
        raise InputError(
            f"{run}: the run is {manifest.state!r}, and may still choose rows; `{command}` goes on "
            "with it, --partial exports what is there"
        )
    # Of equal files the first one has the rows: those of the others are duplicates.
    pool = {file.content_hash: file for file in reversed(job.files)}
    targets: dict[str, list[tuple[str, SourceFile]]] = {}
    for name, files in job.target_files.items():
        for file in files:
            targets.setdefault(file.content_hash, []).append((f"targets/{name}", file))
    sources, unknown = [], 0
    apart = manifest.stages.get(TARGET_GRADIENTS) if stage == "gradients" else None
    planned = record.planned + ([] if apart is None else apart.planned)
    for key in dict.fromkeys(planned):
        content, _, rest = key.rsplit("/", 1)[1].partition("-")
        # Chosen rows of the pool are in shards that are named by them, a target's in whole ranges.
        if content in targets and (rest.count("-") == 1 or content not in pool):
            sources += [Source(*where, key) for where in targets[content]]
        elif content in pool:
            sources.append(Source("candidates", pool[content], key))
        else:
            unknown += 1
    if unknown:
        raise InputError(
            f"{run}: {unknown:,} of its shards are of files that neither data.candidates nor the "
            f"targets hold now; `{command} --replace` runs on what is there"
        )
    order = {file.content_hash: number for number, file in enumerate(job.files)}
    return sorted(sources, key=lambda s: (s.folder, order.get(s.file.content_hash, 0)))
