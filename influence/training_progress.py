"""Progress of a training: a bar on a terminal, a line every 30 s elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from influence.progress import LINE_EVERY_SECONDS
from influence.report_format import seconds as duration

_WINDOW_SECONDS = 60.0


class Watcher(Protocol):
    """Is told what a training does. An exception out of it ends the training."""

    def begin(self, done: int, total: int, per_epoch: int) -> None:
        """`done` steps of `total` are in the checkpoint that training goes on from."""

    def step(self, done: int, loss: float, tokens: int, seconds: float) -> None:
        """Step `done` (from 1) had this loss and these tokens, and took so long."""

    def evaluating(self, name: str, done: int, total: int) -> None:
        """So many rows of a named set have their loss."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def end(self) -> None:
        """No more is to come."""


class TrainingProgress:
    """Shows step, epoch, loss, speed and the time left.

    Args:
        quiet: print nothing.
        console: where to print; stderr unless given.
        clock: seconds, increasing.

    Attributes:
        check: is called at every step; an exception out of it ends the training.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._live = self.console.is_terminal and not quiet
        self.check: Callable[[], None] = lambda: None
        self._clock = clock
        self._last_line = clock()
        self._total = self._done = 0
        self._per_epoch = 1
        self._loss = float("nan")
        self._recent: deque[tuple[int, float]] = deque()
        self._tokens, self._seconds = 0, 0.0  # of those
        self._bars: Bars | None = None

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, done: int, total: int, per_epoch: int) -> None:
        """See `Watcher`."""
        self.end()
        self._done, self._total, self._per_epoch = done, total, per_epoch
        self._recent.clear()
        self._tokens, self._seconds = 0, 0.0
        self._last_line = self._clock()
        after = f" from step {done} on" if done else ""
        self.note(f"training: {total} steps, {per_epoch} an epoch{after}")
        if self._live:
            self._bars = Bars(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                refresh_per_second=2,
            )
            self._bars.add_task("training", total=total, completed=done, text="")
            self._bars.start()

    def step(self, done: int, loss: float, tokens: int, seconds: float) -> None:
        """See `Watcher`."""
        self.check()
        self._done, self._loss = done, loss
        self._recent.append((tokens, seconds))
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        # The last minute's steps, so that a worker that slows down shows; one at least.
        while len(self._recent) > 1 and self._seconds > _WINDOW_SECONDS:
            tokens, seconds = self._recent.popleft()
            self._tokens, self._seconds = self._tokens - tokens, self._seconds - seconds
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, text=self.summary())
        else:
            self._line(self.summary)

    def evaluating(self, name: str, done: int, total: int) -> None:
        """See `Watcher`."""
        text = f"step {self._done} of {self._total}; evaluating {name}: {done} of {total} rows"
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], text=text)
        else:
            self._line(lambda: text)

    def end(self) -> None:
        """See `Watcher`."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def summary(self) -> str:
        """step 12 of 80, epoch 0.30, loss 1.234; 1,234 tokens/s; 2 min 05 s left."""
        text = (
            f"step {self._done} of {self._total}, epoch {self._done / self._per_epoch:.2f}, "
            f"loss {self._loss:.4f}"
        )
        if not self._recent or self._seconds <= 0:
            return text
        speed = self._tokens / self._seconds
        left = (self._total - self._done) * self._seconds / len(self._recent)
        return f"{text}; {speed:,.0f} tokens/s; {_coarse(left)} left"

    def _line(self, text: Callable[[], str]) -> None:
        if self._clock() - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = self._clock()
            self.note(text())
            sys.stderr.flush()


def _coarse(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else duration(seconds)
