"""Attempts at units that wait for a replica, in the order in which they are to be made."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

#: A replica looks for its next unit among so many that wait: those that it may not have are few.
_LOOK_AHEAD = 64


@dataclass(eq=False)
class Attempt:
    """One unit on its way to an answer."""

    unit: Any
    failures: int = 0
    # Nodes that went while it was on one of their replicas.
    nodes_lost: int = 0
    # Its replica died while several units were in flight: it is tried alone, to find the culprit.
    suspect: bool = False
    # When it came to the head of its replica's queue, as far as is known here: its time limit
    # counts from here. Units behind it that finish do not turn its clock back.
    since: float = 0.0
    # It pauses until then: the store failed it, and needs a moment.
    not_before: float = 0.0
    # Replicas on which it raised: another one is tried next, if there is one.
    failed_on: set[Any] = field(default_factory=set)


class Queue:
    """Attempts that wait: the ones that any replica may have, suspects, and those that pause.

    No call looks at more than a few of them, however many wait.
    """

    def __init__(self, units: Iterable[Any]) -> None:
        self._ready = deque(Attempt(unit) for unit in units)
        self._suspects: deque[Attempt] = deque()
        self._paused: list[tuple[float, int, Attempt]] = []
        self._order = count()

    def __len__(self) -> int:
        return len(self._ready) + len(self._suspects) + len(self._paused)

    @property
    def suspects(self) -> int:
        """How many wait to be tried alone."""
        return len(self._suspects)

    @property
    def idle(self) -> bool:
        """Whether there is none that a replica could have now."""
        return not self._ready and not self._suspects

    def add(self, attempt: Attempt, now: float) -> None:
        """At the end, or apart until its pause is over."""
        if attempt.not_before > now:
            heapq.heappush(self._paused, (attempt.not_before, next(self._order), attempt))
        elif attempt.suspect:
            self._suspects.append(attempt)
        else:
            self._ready.append(attempt)

    def put_back(self, attempts: list[Attempt]) -> None:
        """At the head, in their order: their replica is gone."""
        self._suspects.extend(attempt for attempt in attempts if attempt.suspect)
        innocent = [attempt for attempt in attempts if not attempt.suspect]
        self._ready.extendleft(reversed(innocent))

    def wake(self, now: float) -> None:
        """Take in those whose pause is over."""
        while self._paused and self._paused[0][0] <= now:
            self.add(heapq.heappop(self._paused)[2], now)

    def wakes_at(self) -> float:
        """When the next pause is over; infinity if none pauses."""
        return self._paused[0][0] if self._paused else float("inf")

    def take(self, may: Callable[[Attempt], bool], *, suspect: bool = False) -> Attempt | None:
        """Remove and return the first one that a replica may have now."""
        waiting = self._suspects if suspect else self._ready
        for index, attempt in enumerate(islice(waiting, _LOOK_AHEAD)):
            if may(attempt):
                del waiting[index]
                return attempt
        return None

    def has_suspect(self, may: Callable[[Attempt], bool]) -> bool:
        """Whether one waits to be tried alone that a replica may have."""
        return any(may(attempt) for attempt in islice(self._suspects, _LOOK_AHEAD))
