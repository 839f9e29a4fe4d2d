"""A small pool of replica actors: hands out units, survives replicas, loses nothing.

Ray restarts no actor and retries no task here: the driver replaces dead replicas and counts the
attempts of every unit itself, so that a unit that keeps killing its replica is found and named.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from influence.errors import InfluenceError, InputError
from influence.local import retry_pause
from influence.observer import Observer, Silent
from ray_jobs.actors import IN_FLIGHT, cause_of, text_of
from ray_jobs.nodes import node_went

_POLL_SECONDS = 1.0
_START_FAILURES = 5
#: Units that a replica may fail in a row before it is taken for broken.
_FAILURES_IN_A_ROW = 2
#: Nodes that may go under a unit before it is suspected of being the reason.
_NODES_LOST = 10
#: A replica idle for so long is given back; shorter than that, a next phase may well need it.
_IDLE_SECONDS = 5.0


@dataclass(eq=False)
class _Attempt:
    unit: Any
    failures: int = 0
    nodes_lost: int = 0
    # Its replica died while several units were in flight: it is tried alone, to find the culprit.
    suspect: bool = False
    # When it came to the head of its replica's queue, as far as is known here: its time limit
    # counts from here. Units behind it that finish do not turn its clock back.
    since: float = 0.0
    # It pauses until then: the store failed it, and needs a moment.
    not_before: float = 0.0
    # Replicas on which it raised: another one is tried next, if there is one.
    failed_on: set[_Replica] = field(default_factory=set)


@dataclass(eq=False)
class _Replica:
    handle: Any
    ready_ref: Any
    ready: bool = False
    # Where it is, once it is up; whether that node is told to go (it gets no new work then).
    node: str | None = None
    leaving: bool = False
    failures_in_a_row: int = 0
    idle_since: float = 0.0
    # Until when its time is accounted for, and whether there has been nothing to do since.
    counted: float = 0.0
    idle: bool = False
    in_flight: dict[Any, _Attempt] = field(default_factory=dict)

    @property
    def takes(self) -> bool:
        """Whether it may have a further unit: not beside one that is tried alone."""
        alone = any(attempt.suspect for attempt in self.in_flight.values())
        return self.ready and not self.leaving and not alone


class ReplicaPool:
    """Runs units on between `minimum` and `maximum` replicas.

    Args:
        start: starts one replica actor.
        retries: attempts of a unit after its first one.
        shard_seconds: time limit of one unit; a replica that exceeds it is killed.
        on_poll: called about once a second with the replicas that are up, and that are awaited.
        observer: told of the replicas' time with work, and of units that are tried again.
        going: asked at every poll for the ids of the nodes that are told to go.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        *,
        minimum: int,
        maximum: int,
        retries: int,
        shard_seconds: float,
        on_poll: Callable[[int, int], None] = lambda up, starting: None,
        observer: Observer | None = None,
        going: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._start = start
        self._minimum, self._maximum = minimum, maximum
        self._retries, self._shard_seconds = retries, shard_seconds
        self._on_poll, self._going = on_poll, going
        self._observer: Observer = Silent() if observer is None else observer
        self._replicas: list[_Replica] = []
        self._start_failures = 0
        self._replaced = 0  # broken replicas replaced since a unit last succeeded

    def __call__(
        self,
        units: Sequence[Any],
        on_result: Callable[[Any, Any], None],
        on_failure: Callable[[Any, int, str], None],
    ) -> None:
        """Run all units; every unit is reported exactly once, as a result or as a failure.

        Raises:
            InputError: what no retry can mend (bad data, a model that does not load), or replicas
                that keep dying before they are up.
        """
        self._pending = deque(_Attempt(unit) for unit in units)
        self._on_result, self._on_failure = on_result, on_failure
        for replica in self._replicas:
            replica.counted = time.monotonic()
        while self._pending or any(replica.in_flight for replica in self._replicas):
            self._scale()
            self._hand_out()
            self._collect()
            self._enforce_time_limit()
            up = sum(replica.ready for replica in self._replicas)
            self._on_poll(up, len(self._replicas) - up)

    def close(self) -> None:
        """Stop every replica; what they committed stands."""
        for replica in self._replicas:
            ray.kill(replica.handle)
        self._replicas.clear()

    # --- replicas ---

    def _scale(self) -> None:
        self._leave()
        staying = [replica for replica in self._replicas if not replica.leaving]
        busy = sum(bool(replica.in_flight) for replica in staying)
        wanted = max(self._minimum, min(self._maximum, busy + len(self._pending)))
        for _ in range(wanted - len(staying)):
            handle = self._start()
            self._replicas.append(_Replica(handle, handle.ready.remote()))
        # Demand that was never met is withdrawn first, so that the cluster can shrink; then what
        # has nothing to do. A replica at work is never stopped.
        late = time.monotonic() - _IDLE_SECONDS
        starting = [r for r in staying if not r.ready]
        idle = [r for r in staying if r.ready and not r.in_flight and r.idle_since < late]
        for replica in [*starting, *idle][: max(0, len(staying) - wanted)]:
            self._give_back(replica)

    def _leave(self) -> None:
        """Replicas on nodes that are told to go finish what they have, and are then given back."""
        going = self._going()
        for replica in list(self._replicas):
            replica.leaving = replica.node in going
            if replica.leaving and not replica.in_flight:
                self._give_back(replica)

    def _give_back(self, replica: _Replica) -> None:
        ray.kill(replica.handle)
        self._replicas.remove(replica)

    def _up(self, replica: _Replica, where: Any) -> None:
        replica.ready = True
        match where:
            case (str(node), _):
                replica.node = node
        replica.idle_since = replica.counted = time.monotonic()
        self._start_failures = 0

    def _doubt(self, replica: _Replica) -> None:
        """A unit raised on this replica; one that fails every unit is replaced."""
        replica.failures_in_a_row += 1
        if replica.failures_in_a_row < _FAILURES_IN_A_ROW:
            return
        # Replicas that fail one after the other, without any success, are not what is broken.
        if self._replaced >= self._maximum:
            return
        self._replaced += 1
        self._give_back(replica)
        for attempt in self._unfinished(replica):
            self._again(attempt)

    def _again(self, attempt: _Attempt) -> None:
        """Back to the head of the queue: its replica is gone."""
        self._observer.retried(attempt.unit)
        self._pending.appendleft(attempt)

    def _count(self, replica: _Replica, unit: Any) -> None:
        """The time since the replica's last answer, or since it was given work, was this unit's.

        It counts where the replica waited for the driver as well: only where there was nothing
        that it could have been given does no unit have its time.
        """
        now = time.monotonic()
        self._observer.held(unit, now - replica.counted)
        replica.counted = now

    def _lost(self, replica: _Replica, error: BaseException) -> None:
        """A replica is gone: its units go back, and the culprit is looked for.

        A node that goes is no unit's doing, up to a number of times.
        """
        self._replicas.remove(replica)
        blameless = node_went(error, replica.node) or (
            replica.leaving and isinstance(error, RayActorError)
        )
        if not replica.ready and not blameless:
            self._start_failures += 1
            if self._start_failures >= _START_FAILURES:
                raise InputError(
                    f"replicas: {self._start_failures} replicas in a row died before they were up; "
                    f"the last one: {text_of(error)}"
                ) from error
        attempts = self._unfinished(replica)
        for attempt in attempts:
            attempt.nodes_lost += blameless
            blamed = not blameless or attempt.nodes_lost > _NODES_LOST
            if blamed and len(attempts) == 1:
                self._retry(attempt, error)
            else:
                attempt.suspect |= blamed
                self._again(attempt)

    def _unfinished(self, replica: _Replica) -> list[_Attempt]:
        """Units of a replica that is gone, without those whose answer came before."""
        flying = replica.in_flight.items()
        left = [attempt for ref, attempt in flying if not self._arrived(replica, attempt, ref)]
        if left:
            self._count(replica, left[0].unit)
        return left

    def _arrived(self, replica: _Replica, attempt: _Attempt, ref: Any) -> bool:
        """Whether a unit's answer came before its replica went; it is reported then."""
        if not ray.wait([ref], timeout=0)[0]:
            return False
        try:
            value = ray.get(ref)
        except RayError:
            return False
        self._count(replica, attempt.unit)
        self._on_result(attempt.unit, value)
        return True

    # --- units ---

    def _hand_out(self) -> None:
        for _ in range(IN_FLIGHT):
            # Round by round, so that units spread over the replicas before they queue up.
            for replica in self._replicas:
                if not replica.takes or len(replica.in_flight) >= IN_FLIGHT:
                    continue
                attempt = self._next(replica)
                if attempt is None:
                    continue
                self._pending.remove(attempt)
                attempt.since = time.monotonic()
                if replica.idle:
                    replica.counted, replica.idle = attempt.since, False
                replica.in_flight[replica.handle.run.remote(attempt.unit)] = attempt
        for replica in self._replicas:
            replica.idle = not replica.in_flight and not self._pending

    def _next(self, replica: _Replica) -> _Attempt | None:
        """The first unit that this replica may have now."""
        now = time.monotonic()
        for attempt in self._pending:
            if attempt.not_before > now:
                continue
            if replica in attempt.failed_on and self._others(attempt.failed_on):
                continue
            # One that is tried alone waits until its replica has finished the others.
            return None if attempt.suspect and replica.in_flight else attempt
        return None

    def _others(self, failed_on: set[_Replica]) -> bool:
        return any(r.takes and r not in failed_on for r in self._replicas)

    def _collect(self) -> None:
        waiting: dict[Any, _Replica] = {}
        for replica in self._replicas:
            if not replica.ready:
                waiting[replica.ready_ref] = replica
            for ref in replica.in_flight:
                waiting[ref] = replica
        if not waiting:  # every unit that is left pauses
            time.sleep(_POLL_SECONDS / 4)
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
            # One that cannot be reached may live on, and must not hold its place.
            ray.kill(replica.handle)
            self._lost(replica, error)
            return
        except RayTaskError as error:
            self._raised(replica, ref, error)
            return
        except RayError as error:
            # An out-of-memory kill and the like: the replica's state is unknown, so it goes.
            ray.kill(replica.handle)
            self._lost(replica, error)
            return
        if not replica.ready:
            self._up(replica, value)
            return
        replica.failures_in_a_row = self._replaced = 0
        unit = _finished(replica, ref).unit
        self._count(replica, unit)
        self._on_result(unit, value)

    def _raised(self, replica: _Replica, ref: Any, error: RayTaskError) -> None:
        """A unit raised: bad input ends the job, a failing store or anything else does not."""
        cause = cause_of(error)
        if isinstance(cause, InputError):
            raise cause from error
        attempt = _finished(replica, ref)
        self._count(replica, attempt.unit)
        if isinstance(cause, InfluenceError):  # the store's fault, and not the replica's
            attempt.not_before = time.monotonic() + retry_pause(attempt.failures + 1)
        else:
            attempt.failed_on.add(replica)
        self._retry(attempt, error)
        if not isinstance(cause, InfluenceError):
            self._doubt(replica)

    def _retry(self, attempt: _Attempt, error: BaseException) -> None:
        attempt.failures += 1
        if attempt.failures > self._retries:
            self._on_failure(attempt.unit, attempt.failures, text_of(error))
        else:
            self._observer.retried(attempt.unit)
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
    replica.idle_since = time.monotonic()
    return replica.in_flight.pop(ref)
