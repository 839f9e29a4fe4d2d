"""Progress on long work: a live display on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from influence.meter import Left, Meter, Work
from influence.records import Pace
from influence.report_format import seconds as duration
from influence.units import Unit
from influence.worker import UnitResult

LINE_EVERY_SECONDS = 30.0


class Progress:
    """Shows shards of every stage, the speed of all replicas together, replicas, failures and the
    time left, on stderr.

    A stage's own speed is one replica's while its model is at work on that stage: it neither falls
    while another stage has the replicas nor goes on falling once the stage is done. The speed of
    the whole is that of the last minute, so that replicas that come or go show.

    Args:
        quiet: print nothing.
        console: where to print; stderr unless given.
        clock: seconds, increasing.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.replicas = 0
        self.awaited = 0
        self._clock = clock
        self._live = self.console.is_terminal and not quiet
        self._lock = threading.Lock()  # the display is drawn by a thread of its own
        self._meter: Meter | None = None
        self._planned: Mapping[str, Mapping[str, int]] = {}
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_line = clock()

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
    def working(
        self,
        stages: Mapping[str, int],
        reused: int,
        planned: Mapping[str, Mapping[str, int]] | None = None,
    ) -> Iterator[None]:
        """While units are computed.

        Args:
            stages: the missing shards of each stage.
            reused: shards that are there already.
            planned: tokens of the missing shards, {stage: {key: tokens}}, for the time left;
                a stage that is not in it is measured in shards.
        """
        self._planned = planned or {}
        tokens = {stage: sum(of.values()) for stage, of in self._planned.items()}
        work = {stage: Work(n, tokens.get(stage)) for stage, n in stages.items() if n}
        self._meter = Meter(work, self._clock)
        self._last_line = self._clock()
        listing = ", ".join(f"{stage} {each.shards}" for stage, each in work.items())
        self.note(f"shards to compute: {listing}" + (f" (reused: {reused})" if reused else ""))
        try:
            with self._display(self._meter):
                yield
        finally:
            self._meter = None

    @contextmanager
    def _display(self, meter: Meter) -> Iterator[None]:
        """The bars of the stages and a line below them, on a terminal."""
        if not self._live:
            yield
            return
        bars = Bars(
            TextColumn("{task.description:>15}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} shards"),
            TextColumn("{task.fields[speed]}"),
        )
        self._tasks = {
            stage: bars.add_task(stage, total=meter.shards(stage)[1], speed="")
            for stage in meter.stages
        }
        below = _Drawn(lambda: Text(f"{self.summary()}; {_coarse(meter.elapsed)} so far"))
        with Live(Group(bars, below), console=self.console, refresh_per_second=2):
            self._bars = bars
            try:
                yield
            finally:
                self._bars = None

    def up(self, replicas: int, awaited: int) -> None:
        """So many replicas are up, and so many are demanded but not up."""
        self.replicas, self.awaited = replicas, awaited

    def held(self, stage: str, seconds: float) -> None:
        """A replica spent this time on the stage; see `influence.observer.Observer`."""
        if self._meter is not None:
            with self._lock:
                self._meter.held(stage, seconds)

    def retried(self) -> None:
        """A shard is tried again."""
        if self._meter is not None:
            self._meter.retries += 1

    def advance(self, unit: Unit, result: UnitResult) -> None:
        """A shard is committed."""
        meter = self._meter
        if meter is not None:
            with self._lock:
                meter.done(
                    unit.stage,
                    samples=result.rows,
                    tokens=result.tokens,
                    model_seconds=result.model_seconds,
                    set_up_seconds=result.set_up_seconds,
                    planned=self._tokens(unit),
                    computed=result.outcome != "exists",
                )
            if self._bars is not None:
                speed = self._replica_speed(meter, unit.stage).rstrip(", ")
                self._bars.update(self._tasks[unit.stage], advance=1, speed=speed)
        self.tick()

    def tick(self) -> None:
        """Called now and then while units are computed: a line is due even if none finishes."""
        overdue = self._clock() - self._last_line > LINE_EVERY_SECONDS
        if self._meter is not None and self._bars is None and overdue:
            self._line(self._meter)

    def failed(self, unit: Unit, error: str) -> None:
        """A shard failed for good."""
        if self._meter is not None:
            with self._lock:
                self._meter.failed(unit.stage, self._tokens(unit))
        self.note(f"FAILED {unit.stage} {unit.place}: {error}")

    def pace(self) -> Pace | None:
        """Speed and time left, for the run's record; None while no units are computed."""
        meter = self._meter
        if meter is None:
            return None
        with self._lock:
            left = meter.left(self.replicas)
            return Pace(
                samples_per_second=meter.samples_per_second(),
                tokens_per_second=meter.tokens_per_second(),
                seconds_left=left.seconds,
                not_begun=list(left.not_begun),
            )

    def summary(self) -> str:
        """One line on everything that is not of one stage."""
        pace = self.pace()
        parts = []
        if pace is not None and pace.samples_per_second is not None:
            parts.append(speed_text(pace))
        parts.append(f"{self.replicas} replica(s)")
        if self.awaited:
            parts[-1] += f" up, {self.awaited} awaited"
        if self._meter is not None:
            failures, retries = self._meter.failures, self._meter.retries
            parts += [f"{retries} tried again"] if retries else []
            parts.append(f"{failures} failed")
        if pace is not None and (text := left_text(Left(pace.seconds_left, tuple(pace.not_begun)))):
            parts.append(text)
        return "; ".join(parts)

    def _tokens(self, unit: Unit) -> int:
        return self._planned.get(unit.stage, {}).get(unit.key, 0)

    def _replica_speed(self, meter: Meter, stage: str) -> str:
        """Nothing for a stage without model work, or before its first shard."""
        speed = meter.replica_speed(stage)
        return "" if speed is None else f"{speed:,.0f} tokens/s a replica, "

    def _line(self, meter: Meter) -> None:
        self._last_line = self._clock()
        parts = []
        for stage in meter.stages:
            done, total = meter.shards(stage)
            parts.append(f"{stage} {self._replica_speed(meter, stage)}{done}/{total} shards")
        self.note(f"{'; '.join(parts)}; {self.summary()}")
        sys.stderr.flush()


class _Drawn:
    """Text that is made anew whenever the display is drawn."""

    def __init__(self, make: Callable[[], Text]) -> None:
        self._make = make

    def __rich__(self) -> Text:
        return self._make()


def speed_text(pace: Pace) -> str:
    """12.3 samples/s, 4,567 tokens/s; nothing where no speed is known."""
    if pace.samples_per_second is None or pace.tokens_per_second is None:
        return ""
    samples = f"{pace.samples_per_second:,.1f}" if pace.samples_per_second < 100 else ""
    samples = samples or f"{pace.samples_per_second:,.0f}"
    return f"{samples} samples/s, {pace.tokens_per_second:,.0f} tokens/s"


def left_text(left: Left) -> str:
    """4 min 05 s left, and what is not in that; nothing where it is not known."""
    if left.seconds is None:
        return ""
    later = f"{', '.join(left.not_begun)} (not begun)" if left.not_begun else ""
    if later and not left.seconds:
        return f"left: {later}"
    text = f"{_coarse(max(1.0, left.seconds))} left"
    return f"{text}, and {later}" if later else text


def _coarse(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else duration(seconds)
