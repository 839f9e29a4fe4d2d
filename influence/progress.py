"""Progress on long work: a live display on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from influence.units import Unit
from influence.worker import UnitResult

LINE_EVERY_SECONDS = 30.0


class Progress:
    """Shows shards and tokens/s of every stage, replicas and failures, on stderr.

    The speed is one replica's while it is at work on that stage: it neither falls while another
    stage has the replicas nor goes on falling once the stage is done.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.replicas = 0
        self._live = self.console.is_terminal and not quiet
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._reset()

    def _reset(self) -> None:
        self._done: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._failed = 0
        self._working = False
        self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def checking(self, shards: int) -> Iterator[None]:
        """While the cache is searched for what is there already."""
        if shards > 1000:
            self.note(f"looking for {shards} shards in the cache ...")
        yield

    @contextmanager
    def working(self, stages: Mapping[str, int], reused: int) -> Iterator[None]:
        """While units are computed; `stages` holds the missing shards of each stage."""
        self._reset()
        self._total = {stage: count for stage, count in stages.items() if count}
        listing = ", ".join(f"{stage} {count}" for stage, count in self._total.items())
        self.note(f"shards to compute: {listing}" + (f" (reused: {reused})" if reused else ""))
        self._working = True
        try:
            with self._display():
                yield
        finally:
            self._working = False

    @contextmanager
    def _display(self) -> Iterator[None]:
        """The bars of the stages, on a terminal."""
        if not self._live:
            yield
            return
        columns = (
            TextColumn("{task.description:>15}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} shards"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console, transient=False) as bars:
            self._bars = bars
            self._tasks = {
                stage: bars.add_task(stage, total=count, rate="")
                for stage, count in self._total.items()
            }
            try:
                yield
            finally:
                self._bars = None

    def advance(self, unit: Unit, result: UnitResult) -> None:
        """A shard is committed."""
        self._done[unit.stage] = self._done.get(unit.stage, 0) + 1
        self._tokens[unit.stage] = self._tokens.get(unit.stage, 0) + result.tokens
        self._seconds[unit.stage] = self._seconds.get(unit.stage, 0.0) + result.model_seconds
        if self._bars is not None:
            rate = f"{self._rate(unit.stage)}{self.replicas} replica(s)"
            self._bars.update(self._tasks[unit.stage], advance=1, rate=rate)
        self.tick()

    def tick(self) -> None:
        """Called now and then while units are computed: a line is due even if none finishes."""
        overdue = time.monotonic() - self._last_line > LINE_EVERY_SECONDS
        if self._working and self._bars is None and overdue:
            self._line()

    def failed(self, unit: Unit, error: str) -> None:
        """A shard failed for good."""
        self._failed += 1
        self.note(f"FAILED {unit.stage} {unit.file.url} rows {unit.first}-{unit.last}: {error}")

    def _rate(self, stage: str) -> str:
        """Nothing for a stage without model work, or before its first shard."""
        seconds = self._seconds.get(stage, 0.0)
        if seconds <= 0:
            return ""
        return f"{self._tokens[stage] / seconds:,.0f} tokens/s a replica, "

    def _line(self) -> None:
        self._last_line = time.monotonic()
        parts = [
            f"{stage} {self._rate(stage)}{self._done.get(stage, 0)}/{total} shards"
            for stage, total in self._total.items()
        ]
        failures = f"; {self._failed} failed" if self._failed else ""
        self.note(f"{'; '.join(parts)}; {self.replicas} replica(s){failures}")
        sys.stderr.flush()
