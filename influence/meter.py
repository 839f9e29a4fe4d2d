"""How far a phase is, how fast it goes, and how long it still takes: the arithmetic alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

#: Speeds are those of the last minute, or of twice a shard's time where that is longer.
WINDOW_SECONDS = 60.0


@dataclass(frozen=True)
class Work:
    """What a stage has to do: its missing shards, and their tokens where those are known."""

    shards: int
    tokens: int | None = None


class Left(NamedTuple):
    """Time left: seconds for the stages whose speed is known (None: no replica is up, no speed is
    known, or what is left takes longer than it should), and the stages of which no shard has been
    computed yet, whose time is not in it."""

    seconds: float | None
    not_begun: tuple[str, ...]


@dataclass
class _Stage:
    work: Work
    done: int = 0  # committed, by whomever
    failed: int = 0
    answered: int = 0  # units of bundles that were answered, failed ones too: not to do any more
    computed: int = 0
    planned_gone: int = 0
    planned_computed: int = 0
    tokens: int = 0
    model_seconds: float = 0.0
    spent: float = 0.0  # replica-seconds, without setting up


class _Answer(NamedTuple):
    time: float
    held: float
    samples: int
    tokens: int


class Meter:
    """Counts what is done of the stages of a phase, which share the replicas.

    Args:
        work: of each stage.
        clock: seconds, increasing.
    """

    def __init__(
        self, work: Mapping[str, Work], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stages = {name: _Stage(each) for name, each in work.items()}
        self._clock = clock
        self._begun = clock()
        self._answers: list[_Answer] = []
        self._held = 0.0
        self.failures = 0
        self.retries = 0

    @property
    def stages(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self._stages)

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._begun

    def held(self, stage: str, seconds: float) -> None:
        """A replica spent this time on the stage, whatever came of it; see `Observer.held`."""
        self._stages[stage].spent += seconds
        self._held = seconds

    def done(
        self,
        stage: str,
        *,
        samples: int = 0,
        tokens: int = 0,
        model_seconds: float = 0.0,
        set_up_seconds: float = 0.0,
        planned: int = 0,
        computed: bool = True,
    ) -> None:
        """A shard is committed.

        `planned` are its tokens in the stage's `Work`. A shard that was not `computed` is gone
        from what is to do, and says nothing of the speed.
        """
        of = self._stages[stage]
        of.done += 1
        of.answered += 1
        of.planned_gone += planned
        of.tokens += tokens
        of.model_seconds += model_seconds
        # A replica loads its model once: counted as a price of every shard it would grow with them.
        of.spent = max(0.0, of.spent - set_up_seconds)
        if computed:
            of.computed += 1
            of.planned_computed += planned
        self._answers.append(_Answer(self._clock(), self._held, samples, tokens))
        self._held = 0.0

    def failed(self, stage: str, planned: int = 0) -> None:
        """A shard failed for good."""
        of = self._stages[stage]
        of.failed += 1
        of.answered += 1
        of.planned_gone += planned
        self.failures += 1

    def shards(self, stage: str) -> tuple[int, int]:
        """(committed in this phase, to be committed)."""
        of = self._stages[stage]
        return of.done, of.work.shards

    def replica_speed(self, stage: str) -> float | None:
        """Tokens per second of one replica while its model is at work on the stage."""
        of = self._stages[stage]
        return of.tokens / of.model_seconds if of.model_seconds > 0 else None

    def samples_per_second(self) -> float | None:
        """Of all stages and replicas, over the window; None before the first shard."""
        return self._rate(lambda answer: answer.samples)

    def tokens_per_second(self) -> float | None:
        """Of all stages and replicas, over the window; None before the first shard."""
        return self._rate(lambda answer: answer.tokens)

    def left(self, replicas: int) -> Left:
        """Time left with so many replicas: each stage's missing tokens (where its tokens are not
        known: shards) at the price in replica-seconds that one of them has had.

        Since the last answer the replicas have been at work, on one shard each: without that the
        time would stand still while a shard takes minutes.
        """
        total, shards, not_begun = 0.0, 0, []
        for name, of in self._stages.items():
            missing = of.work.shards - of.answered
            if missing <= 0:
                continue
            by_tokens = of.work.tokens is not None and of.planned_computed > 0
            units = of.planned_computed if by_tokens else of.computed
            if not units or of.spent <= 0:
                not_begun.append(name)
                continue
            if by_tokens and of.work.tokens is not None:
                missing = max(0, of.work.tokens - of.planned_gone)
            total += of.spent / units * missing
            shards += of.work.shards - of.answered
        if replicas < 1 or not self._begun_any():
            return Left(None, tuple(not_begun))
        if not shards:
            return Left(0.0, tuple(not_begun))
        since = self._clock() - self._answers[-1].time if self._answers else 0.0
        left = total - min(replicas, shards) * min(since, total / shards)
        return Left(left / replicas if left > 0 else None, tuple(not_begun))

    def _rate(self, amount: Callable[[_Answer], int]) -> float | None:
        if not self._begun_any() or self.elapsed <= 0:
            return None
        # Back from the newest: a shard that took long widens the window to twice that, so that it
        # is still in it while the next one takes as long.
        now, span, total = self._clock(), WINDOW_SECONDS, 0
        for answer in reversed(self._answers):
            wider = max(span, 2 * answer.held)
            if answer.time < now - wider:
                break
            span = wider
            total += amount(answer)
        return total / min(span, self.elapsed)

    def _begun_any(self) -> bool:
        return any(of.answered for of in self._stages.values())
