"""A small pool of replica actors: hands out units, survives replicas, loses nothing.

Ray restarts no actor and retries no task here: the driver replaces dead replicas and counts the
attempts of every unit itself, so that a unit that keeps killing its replica is found and named.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from influence.errors import InfluenceError, InputError
from ray_jobs.actors import IN_FLIGHT, cause_of

_POLL_SECONDS = 1.0
_START_FAILURES = 5


@dataclass
class _Attempt:
    unit: Any
    failures: int = 0
    # Its replica died while several units were in flight: it is tried alone, to find the culprit.
    suspect: bool = False
    # When it came to the head of its replica's queue, as far as is known here: its time limit
    # counts from here. Units behind it that finish do not turn its clock back.
    since: float = 0.0


@dataclass
class _Replica:
    handle: Any
    ready_ref: Any
    ready: bool = False
    in_flight: dict[Any, _Attempt] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return any(attempt.suspect for attempt in self.in_flight.values())


class ReplicaPool:
    """Runs units on between `minimum` and `maximum` replicas.

    Args:
        start: starts one replica actor.
        retries: attempts of a unit after its first one.
        shard_seconds: time limit of one unit; a replica that exceeds it is killed.
        on_replicas: told the number of replicas that are up whenever it changes.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        *,
        minimum: int,
        maximum: int,
        retries: int,
        shard_seconds: float,
        on_replicas: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._start = start
        self._minimum, self._maximum = minimum, maximum
        self._retries, self._shard_seconds = retries, shard_seconds
        self._on_replicas = on_replicas
        self._replicas: list[_Replica] = []
        self._start_failures = 0

    def __call__(
        self,
        units: Sequence[Any],
        on_result: Callable[[Any, Any], None],
        on_failure: Callable[[Any, int, str], None],
    ) -> None:
        """Run all units; every unit is reported exactly once, as a result or as a failure.

        Raises:
            InfluenceError: what no retry can mend (bad data, a model that does not load).
            InputError: replicas keep dying before they are up.
        """
        self._pending = deque(_Attempt(unit) for unit in units)
        self._on_result, self._on_failure = on_result, on_failure
        while self._pending or any(replica.in_flight for replica in self._replicas):
            self._scale()
            self._hand_out()
            self._collect()
            self._enforce_time_limit()

    def close(self) -> None:
        """Stop every replica; what they committed stands."""
        for replica in self._replicas:
            ray.kill(replica.handle)
        self._replicas.clear()

    # --- replicas ---

    def _scale(self) -> None:
        work = len(self._pending) + sum(len(replica.in_flight) for replica in self._replicas)
        wanted = max(self._minimum, min(self._maximum, work))
        while len(self._replicas) < wanted:
            handle = self._start()
            self._replicas.append(_Replica(handle, handle.ready.remote()))
        if len(self._replicas) > wanted:
            # Demand that was never met is withdrawn, so that the cluster can shrink.
            for replica in [r for r in self._replicas if not r.ready][
                : len(self._replicas) - wanted
            ]:
                ray.kill(replica.handle)
                self._replicas.remove(replica)

    def _up(self, replica: _Replica) -> None:
        replica.ready = True
        self._start_failures = 0
        self._on_replicas(sum(r.ready for r in self._replicas))

    def _lost(self, replica: _Replica, error: BaseException) -> None:
        """A replica is gone: its units go back, and the culprit is looked for."""
        self._replicas.remove(replica)
        self._on_replicas(sum(r.ready for r in self._replicas))
        if not replica.ready:
            self._start_failures += 1
            if self._start_failures >= _START_FAILURES:
                raise InputError(
                    f"replicas: {self._start_failures} replicas in a row died before they were up; "
                    f"the last one: {_text(error)}"
                ) from error
        attempts = [
            attempt for ref, attempt in replica.in_flight.items() if not self._arrived(attempt, ref)
        ]
        preempted = isinstance(error, ActorDiedError) and bool(getattr(error, "preempted", False))
        for attempt in attempts:
            if len(attempts) == 1 and not preempted:
                self._retry(attempt, error)
            else:
                attempt.suspect = not preempted
                self._pending.appendleft(attempt)

    def _arrived(self, attempt: _Attempt, ref: Any) -> bool:
        """Whether a unit's answer came before its replica went; it is reported then."""
        if not ray.wait([ref], timeout=0)[0]:
            return False
        try:
            value = ray.get(ref)
        except RayError:
            return False
        self._on_result(attempt.unit, value)
        return True

    # --- units ---

    def _hand_out(self) -> None:
        for _ in range(IN_FLIGHT):
            # Round by round, so that units spread over the replicas before they queue up.
            for replica in self._replicas:
                if not self._pending:
                    return
                if not replica.ready or replica.alone or len(replica.in_flight) >= IN_FLIGHT:
                    continue
                if self._pending[0].suspect and replica.in_flight:
                    continue
                attempt = self._pending.popleft()
                attempt.since = time.monotonic()
                replica.in_flight[replica.handle.run.remote(attempt.unit)] = attempt

    def _collect(self) -> None:
        waiting: dict[Any, _Replica] = {}
        for replica in self._replicas:
            if not replica.ready:
                waiting[replica.ready_ref] = replica
            for ref in replica.in_flight:
                waiting[ref] = replica
        if not waiting:
            return
        refs = list(waiting)
        done, _ = ray.wait(refs, num_returns=1, timeout=_POLL_SECONDS)
        if done and len(refs) > 1:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for ref in done:
            replica = waiting[ref]
            if replica in self._replicas:
                self._settle(replica, ref)

    def _settle(self, replica: _Replica, ref: Any) -> None:
        try:
            value = ray.get(ref)
        except RayActorError as error:
            self._lost(replica, error)
            return
        except RayTaskError as error:
            cause = cause_of(error)
            if isinstance(cause, InfluenceError):
                raise cause from error
            self._retry(_finished(replica, ref), error)
            return
        except RayError as error:
            # An out-of-memory kill and the like: the replica's state is unknown, so it goes.
            ray.kill(replica.handle)
            self._lost(replica, error)
            return
        if not replica.ready:
            self._up(replica)
            return
        self._on_result(_finished(replica, ref).unit, value)

    def _retry(self, attempt: _Attempt, error: BaseException) -> None:
        attempt.failures += 1
        if attempt.failures > self._retries:
            self._on_failure(attempt.unit, attempt.failures, _text(error))
        else:
            self._pending.append(attempt)

    def _enforce_time_limit(self) -> None:
        now = time.monotonic()
        for replica in list(self._replicas):
            late = [a for a in replica.in_flight.values() if now - a.since > self._shard_seconds]
            if late:
                ray.kill(replica.handle)
                text = f"not finished in {self._shard_seconds:g} s (replicas.shard_seconds)"
                self._lost(replica, TimeoutError(text))


def _finished(replica: _Replica, ref: Any) -> _Attempt:
    """Take a unit off its replica; the clocks of the units that waited behind it start anew."""
    refs = list(replica.in_flight)
    for behind in refs[refs.index(ref) + 1 :]:
        replica.in_flight[behind].since = time.monotonic()
    return replica.in_flight.pop(ref)


def _text(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
