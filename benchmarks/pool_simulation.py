"""A cluster in memory alone, on a clock that only events move: what `ReplicaPool` asks of Ray.

The pool itself is the real one. Replicas find a place or wait for one, take their units one after
the other, and die, hang and raise as they are told, drawn from a seed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from ray.exceptions import ActorDiedError, RayError, RayTaskError

from influence.errors import StorageError

Kind = Literal["fine", "raises", "store", "kills", "hangs"]


@dataclass(frozen=True)
class Fate:
    """What an attempt at a unit comes to, and after how many seconds."""

    kind: Kind = "fine"
    seconds: float = 1.0


class SimulatedAnswer:
    """See `ray_jobs.calls.Answer`."""

    __slots__ = ("_error", "_there", "_value")

    def __init__(self) -> None:
        self._there, self._value = False, None
        self._error: RayError | None = None

    def done(self) -> bool:
        """Whether it is there."""
        return self._there

    def result(self) -> Any:
        """The value, or the error raised."""
        if self._error is not None:
            raise self._error
        return self._value

    def settle(self, value: Any, error: RayError | None) -> None:
        """It is there now."""
        self._there, self._value, self._error = True, value, error


@dataclass(eq=False)
class SimulatedReplica:
    """An actor: waiting for a place, at work on the first of its units, or dead."""

    up: SimulatedAnswer = field(default_factory=SimulatedAnswer)
    placed: bool = False
    dead: bool = False
    units: deque[tuple[Any, SimulatedAnswer]] = field(default_factory=deque)


class SimulatedCluster:
    """A `ray_jobs.calls.Calls` without Ray.

    Args:
        fate: what becomes of an attempt: called with the unit, the number of the attempt (from 1)
            and the generator of random numbers.
        places: replicas that find room; see `resize`.
        start_seconds: from a replica's place to its first word.
        lifetime: mean seconds (exponential) after which a replica dies; None: never.
        newest_first: replicas go on with the newest of their units, not with the oldest.
        seed: of all that is drawn.

    Attributes:
        calls: how often each method was called.
        attempts: of every unit.
        deaths: replicas that died by themselves.
        alive: replicas that were started and are not dead.
        most: the most that there ever were of them.
        worked: seconds of all replicas together on units that were answered.
    """

    def __init__(
        self,
        fate: Callable[[Any, int, random.Random], Fate],
        *,
        places: int = 1_000_000,
        start_seconds: float = 5.0,
        lifetime: float | None = None,
        newest_first: bool = False,
        seed: int = 0,
    ) -> None:
        self._newest_first = newest_first
        self._fate, self._places, self._start_seconds = fate, places, start_seconds
        self._lifetime, self._random = lifetime, random.Random(seed)
        self._clock, self._order = 0.0, count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._told: list[SimulatedAnswer] = []
        self.alive: dict[SimulatedReplica, None] = {}
        self._unplaced: dict[SimulatedReplica, None] = {}
        self.calls, self.attempts = Counter[str](), Counter[Any]()
        self.deaths, self.most, self.worked = 0, 0, 0.0

    # --- what the pool calls ---

    def start(self) -> SimulatedReplica:
        """A new replica; it is up once there is a place for it, and `start_seconds` later."""
        replica = SimulatedReplica()
        self.alive[replica] = self._unplaced[replica] = None
        self.most = max(self.most, len(self.alive))
        self._place()
        return replica

    def ready(self, handle: SimulatedReplica) -> SimulatedAnswer:
        """See `Calls`."""
        self.calls["ready"] += 1
        return handle.up

    def run(self, handle: SimulatedReplica, unit: Any) -> SimulatedAnswer:
        """See `Calls`."""
        self.calls["run"] += 1
        answer = SimulatedAnswer()
        if handle.dead:
            self._tell(answer, None, ActorDiedError())
            return answer
        handle.units.append((unit, answer))
        if len(handle.units) == 1:
            self._begin(handle)
        return answer

    def arrived(self, seconds: float) -> list[SimulatedAnswer]:
        """See `Calls`; the clock moves to the next event that brings an answer."""
        self.calls["arrived"] += 1
        until = self._clock + seconds
        while not self._told and self._events and self._events[0][0] <= until:
            self._clock, _, happen = heapq.heappop(self._events)
            happen()
        if not self._told:
            self._clock = until
        told, self._told = self._told, []
        return told

    def kill(self, handle: SimulatedReplica) -> None:
        """See `Calls`."""
        self.calls["kill"] += 1
        self._end(handle)

    def node_went(self, error: BaseException, node: str | None) -> bool:
        """See `Calls`: nobody knows here."""
        del error, node
        return False

    def now(self) -> float:
        """See `Calls`."""
        return self._clock

    # --- what happens ---

    def at(self, seconds: float, happen: Callable[[], None]) -> None:
        """Let something happen at a time of the clock."""
        heapq.heappush(self._events, (seconds, next(self._order), happen))

    def resize(self, places: int) -> None:
        """Nodes join, or leave with the replicas that came last."""
        self._places = places
        placed = [replica for replica in self.alive if replica.placed]
        for replica in placed[places:]:
            self._die(replica)
        self._place()

    def _place(self) -> None:
        while self._unplaced and len(self.alive) - len(self._unplaced) < self._places:
            replica = next(iter(self._unplaced))
            del self._unplaced[replica]
            replica.placed = True
            self.at(self._clock + self._start_seconds, lambda one=replica: self._come_up(one))

    def _come_up(self, replica: SimulatedReplica) -> None:
        if replica.dead:
            return
        self._tell(replica.up, None)
        if self._lifetime is not None:
            until = self._clock + self._random.expovariate(1 / self._lifetime)
            self.at(until, lambda: self._die(replica))

    def _begin(self, replica: SimulatedReplica) -> None:
        """The first of a replica's units is at work from now on."""
        unit, answer = replica.units[0]
        self.attempts[unit] += 1
        fate = self._fate(unit, self.attempts[unit], self._random)
        if fate.kind != "hangs":
            end = self._clock + fate.seconds
            self.at(end, lambda: self._finish(replica, unit, answer, fate))

    def _finish(
        self, replica: SimulatedReplica, unit: Any, answer: SimulatedAnswer, fate: Fate
    ) -> None:
        if replica.dead:
            return
        if fate.kind == "kills":
            self._die(replica)
            return
        error = None
        if fate.kind in ("raises", "store"):
            store = StorageError("the store answered 503 and kept failing")
            cause = store if fate.kind == "store" else ValueError("cannot be read")
            error = RayTaskError("run", "", cause)
        else:
            self.worked += fate.seconds
        self._tell(answer, unit, error)
        replica.units.popleft()
        if self._newest_first:
            replica.units.rotate(1)
        if replica.units:
            self._begin(replica)

    def _die(self, replica: SimulatedReplica) -> None:
        if not replica.dead:
            self.deaths += 1
            self._end(replica)

    def _end(self, replica: SimulatedReplica) -> None:
        """A replica is no more: whatever it still owed is answered with its death."""
        if replica.dead:
            return
        replica.dead = True
        self.alive.pop(replica, None)
        self._unplaced.pop(replica, None)
        owed = [answer for _, answer in replica.units]
        for answer in owed if replica.up.done() else [replica.up]:
            self._tell(answer, None, ActorDiedError())
        self._place()

    def _tell(self, answer: SimulatedAnswer, value: Any, error: RayError | None = None) -> None:
        answer.settle(value, error)
        self._told.append(answer)
