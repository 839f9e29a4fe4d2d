"""What the steps of one run share, and how its units are computed: cached ones never again.

Nothing here knows of Ray: how units are executed is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from influence.cache import Cache
from influence.candidates import SourceFile
from influence.config import Config
from influence.errors import ShardsFailedError
from influence.fingerprints import Fingerprint
from influence.model_shape import ModelShape, model_shape
from influence.own_training import OwnTraining
from influence.progress import Progress
from influence.run_log import RunLog
from influence.units import Bundle, Unit, bundled
from influence.watch import Watch
from influence.worker import UnitResult


class SelectRun(Protocol):
    """Makes a select run of another config: its folder, its stages, workers of its own.

    `after` is called with its job and its reducer once the selection is written.
    """

    def __call__(
        self, config: Config, *, after: Callable[[Job, Any], None] = ...
    ) -> dict[str, Any]: ...


class Execute(Protocol):
    """Runs bundles of units in any order; reports each one exactly once."""

    def __call__(
        self,
        bundles: Sequence[Bundle],
        on_result: Callable[[Bundle, list[UnitResult]], None],
        on_failure: Callable[[Bundle, int, str], None],
        /,
    ) -> None: ...


@dataclass
class Job:
    """What the steps of one run share.

    `shape` is there for methods that need gradients; `held_rows` are the rows of shards by key.
    `tokens` says how many tokens units have, once the catalogue is known. `layers_key` names the
    object that says which layers gradients are taken of, where the config alone does not.
    `replicas` work at once at most, where that does not follow from the config; `chosen` are the
    first landmarks, or the pilot on which layers are chosen; `asked` is a digest of everything that
    decides what follows from them. `own_training` is one that the job itself makes first. `against`
    are files whose rows no candidate should be, beside the targets' own. `select_run` is there for
    evaluations, whose own units have no replicas while it works.
    """

    config: Config
    fingerprints: dict[str, Fingerprint]
    files: list[SourceFile]
    target_files: dict[str, list[SourceFile]]
    cache: Cache
    log: RunLog
    progress: Progress
    watch: Watch
    execute: Execute | None = None
    tokens: Callable[[Sequence[Unit]], list[int]] | None = None
    shape: ModelShape | None = None
    layers_key: str | None = None
    held_rows: dict[str, list[int]] = field(default_factory=dict)
    replicas: int | None = None
    chosen: Sequence[tuple[SourceFile, Sequence[int]]] | None = None
    asked: str = ""
    own_training: OwnTraining | None = None
    select_run: SelectRun | None = None
    against: dict[str, list[SourceFile]] = field(default_factory=dict)

    @property
    def model_shape(self) -> ModelShape:
        """`shape`, or that of the config's model where nobody has asked for it yet."""
        return self.shape if self.shape is not None else model_shape(self.config)


def run_units(job: Job, units: Sequence[Unit]) -> None:
    """Compute what the cache does not hold yet.

    Raises:
        ShardsFailedError: a unit failed for good (all others are committed).
    """
    by_stage: dict[str, list[Unit]] = {}
    for unit in units:
        by_stage.setdefault(unit.stage, []).append(unit)
    start, up = time.monotonic(), job.watch.up_seconds
    job.log.doing(", ".join(by_stage))
    with job.progress.checking(len(units)):
        present = job.cache.present([unit.key for unit in units])
        whole = job.cache.verify(sorted(present))
    missing: dict[str, Unit] = {}
    for stage, members in by_stage.items():
        job.log.begin(stage, job.fingerprints[stage], members)
        for unit in members:
            if unit.key in whole:
                job.log.reused(unit)
            else:
                missing.setdefault(unit.key, unit)
    for key in sorted(present - whole):
        job.log.damaged(missing[key].stage, key)
        job.progress.note(f"damaged shard, computed again: {key}")
    job.log.save()
    records = job.log.manifest.stages
    before = {stage: records[stage].replica_seconds for stage in by_stage}
    if missing:
        if job.execute is None:
            raise RuntimeError("units to compute, but no executor: call select, or set job.execute")
        bundles = bundled(missing.values())
        counts = {stage: _of(missing, stage) for stage in by_stage}
        with job.progress.working(counts, len(whole), _planned_tokens(job, bundles)):
            job.execute(bundles, job.watch.done, job.watch.failed)
    spent = {stage: records[stage].replica_seconds - before[stage] for stage in by_stage}
    wall, up, total = time.monotonic() - start, job.watch.up_seconds - up, sum(spent.values())
    for stage, seconds in spent.items():
        # Stages share the replicas: each gets its part of the wall time by the time it held them.
        part = seconds / total if total else 1 / len(spent)
        job.log.took(stage, wall * part, up * part)
    raise_failures(job)


def raise_failures(job: Job) -> None:
    """Raise ShardsFailedError if a unit of this run failed for good."""
    failures = job.log.failures()
    if failures:
        job.log.save()
        raise ShardsFailedError(_failure_text(failures))


@contextmanager
def timed(job: Job, stage: str, *, quiet: bool = False) -> Iterator[None]:
    """Add the block's wall time to a stage of the manifest."""
    start, up = time.monotonic(), job.watch.up_seconds
    if not quiet:
        job.progress.note(f"{stage} ...")
    job.log.doing(stage)
    job.log.save()
    yield
    job.log.took(stage, time.monotonic() - start, job.watch.up_seconds - up)


def _planned_tokens(job: Job, bundles: Sequence[Bundle]) -> dict[str, dict[str, int]]:
    """Tokens by stage and key, as far as they are known. A pass counts for a bundle's first unit,
    as in its results."""
    if job.tokens is None:
        return {}
    planned: dict[str, dict[str, int]] = {}
    tokens = job.tokens([bundle.units[0] for bundle in bundles])
    for bundle, count in zip(bundles, tokens, strict=True):
        planned.setdefault(bundle.units[0].stage, {})[bundle.units[0].key] = count
    return planned


def _of(missing: Mapping[str, Unit], stage: str) -> int:
    return sum(unit.stage == stage for unit in missing.values())


def _failure_text(failures: Sequence[Any]) -> str:
    lines = [f"{len(failures)} shard(s) failed for good; everything else is committed."]
    lines += [f"  {failed.place} ({failed.tries}): {failed.error}" for failed in failures[:10]]
    if len(failures) > 10:
        lines.append(f"  ... and {len(failures) - 10} more; see manifest.json")
    lines.append("Mend the cause and run the same command again: it goes on from there.")
    return "\n".join(lines)
