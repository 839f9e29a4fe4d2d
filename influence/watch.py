"""Passes what happens to a run's bundles on to its record, to its display, and to whoever else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from influence.observer import Observer
from influence.progress import Progress
from influence.records import Manifest, ReplicaCount
from influence.run_log import RunLog
from influence.units import Bundle
from influence.worker import UnitResult


class Watch:
    """An `Observer` of the whole run.

    Args:
        log: the run's record.
        progress: the display.
        clock: seconds, increasing.

    Attributes:
        others: observers that are told the same, after record and display.
    """

    def __init__(
        self, log: RunLog, progress: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.others: list[Observer] = []
        self._most = 0
        self._log, self._progress, self._clock = log, progress, clock
        self._counted = clock()
        self._up_seconds = 0.0
        log.refresh = self.fill

    def replicas(self, up: int, awaited: int) -> None:
        """Called about once a second while units are computed; see `Observer`."""
        self._count()
        self._most = max(self._most, up)
        self._progress.up(up, awaited)
        self._progress.tick()
        for other in self.others:
            other.replicas(up, awaited)
        self._log.sign_of_life()

    def held(self, bundle: Bundle, seconds: float) -> None:
        """See `Observer`."""
        stage = bundle.units[0].stage
        self._log.held(stage, seconds)
        self._progress.held(stage, seconds)
        for other in self.others:
            other.held(bundle, seconds)

    def retried(self, bundle: Bundle) -> None:
        """See `Observer`."""
        self._progress.retried()
        for other in self.others:
            other.retried(bundle)

    def done(self, bundle: Bundle, results: Sequence[UnitResult]) -> None:
        """See `Observer`."""
        for unit, result in zip(bundle.units, results, strict=True):
            self._log.done(unit.stage, result)
            self._progress.advance(unit, result)
        for other in self.others:
            other.done(bundle, results)

    def failed(self, bundle: Bundle, attempts: int, error: str) -> None:
        """See `Observer`."""
        for unit in bundle.units:
            self._log.failed(unit, attempts, error)
            self._progress.failed(unit, error)
        for other in self.others:
            other.failed(bundle, attempts, error)

    def fill(self, manifest: Manifest) -> None:
        """Bring the replicas and the pace in the run's record up to date."""
        self._count()
        manifest.replicas = ReplicaCount(
            up=self._progress.replicas,
            awaited=self._progress.awaited,
            up_seconds=self._up_seconds,
            most=self._most,
        )
        manifest.pace = self._progress.pace() if manifest.state == "running" else None

    @property
    def up_seconds(self) -> float:
        """Seconds of all replicas that were up so far, at work or not."""
        self._count()
        return self._up_seconds

    def _count(self) -> None:
        """Replicas that were up stay up until the next word, between phases too."""
        now = self._clock()
        self._up_seconds += self._progress.replicas * (now - self._counted)
        self._counted = now
