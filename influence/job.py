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
from influence.model_shape import ModelShape
from influence.progress import Progress
from influence.run_log import RunLog
from influence.units import Bundle, Unit, bundled
from influence.worker import UnitResult


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
    """

    config: Config
    fingerprints: dict[str, Fingerprint]
    files: list[SourceFile]
    target_files: dict[str, list[SourceFile]]
    cache: Cache
    log: RunLog
    progress: Progress
    execute: Execute | None = None
    shape: ModelShape | None = None
    held_rows: dict[str, list[int]] = field(default_factory=dict)


def run_units(job: Job, units: Sequence[Unit]) -> None:
    """Compute what the cache does not hold yet.

    Raises:
        ShardsFailedError: a unit failed for good (all others are committed).
    """
    by_stage: dict[str, list[Unit]] = {}
    for unit in units:
        by_stage.setdefault(unit.stage, []).append(unit)
    start = time.monotonic()
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
        job.progress.note(f"damaged shard, computed again: {key}")
    job.log.save()
    spent = dict.fromkeys(by_stage, 0.0)

    def on_result(bundle: Bundle, results: list[UnitResult]) -> None:
        for unit, result in zip(bundle.units, results, strict=True):
            job.log.done(unit.stage, result)
            spent[unit.stage] += result.seconds
            job.progress.advance(unit, result)

    def on_failure(bundle: Bundle, attempts: int, error: str) -> None:
        for unit in bundle.units:
            job.log.failed(unit, attempts, error)
            job.progress.failed(unit, error)

    if missing:
        if job.execute is None:
            raise RuntimeError("units to compute, but no executor: call select, or set job.execute")
        with job.progress.working({s: _of(missing, s) for s in by_stage}, len(whole)):
            job.execute(bundled(missing.values()), on_result, on_failure)
    wall, total = time.monotonic() - start, sum(spent.values())
    for stage, seconds in spent.items():
        # Stages share the replicas: each gets its part of the wall time by the time it held them.
        job.log.took(stage, wall * (seconds / total if total else 1 / len(spent)))
    failures = job.log.failures()
    if failures:
        job.log.save()
        raise ShardsFailedError(_failure_text(failures))


@contextmanager
def timed(job: Job, stage: str, *, quiet: bool = False) -> Iterator[None]:
    """Add the block's wall time to a stage of the manifest."""
    start = time.monotonic()
    if not quiet:
        job.progress.note(f"{stage} ...")
    yield
    job.log.took(stage, time.monotonic() - start)


def _of(missing: Mapping[str, Unit], stage: str) -> int:
    return sum(unit.stage == stage for unit in missing.values())


def _failure_text(failures: Sequence[Any]) -> str:
    lines = [f"{len(failures)} shard(s) failed for good; everything else is committed."]
    lines += [
        f"  {failed.file} rows {failed.first}-{failed.last} ({failed.attempts} attempts): "
        f"{failed.error}"
        for failed in failures[:10]
    ]
    if len(failures) > 10:
        lines.append(f"  ... and {len(failures) - 10} more; see manifest.json")
    lines.append("Mend the cause and run the same command again: it goes on from there.")
    return "\n".join(lines)
