"""A small pool of replica actors: hands out units, survives replicas, loses nothing.

Ray restarts no actor and retries no task here: the driver replaces dead replicas and counts the
attempts of every unit itself, so that a unit that keeps killing its replica is found and named.

What the pool does at an answer does not grow with the number of units or of replicas; only what it
does once a second looks at every replica.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from influence.errors import InfluenceError, InputError, UnitError
from influence.local import retry_pause
from influence.observer import Observer, Silent
from ray_jobs.attempts import Attempt, Queue
from ray_jobs.calls import Answer, Calls, RayCalls
from ray_jobs.replicas import Replica, Replicas
from ray_jobs.task_errors import cause_of, text_of

_POLL_SECONDS = 1.0
_START_FAILURES = 5
#: Units that a replica may fail in a row before it is taken for broken.
_FAILURES_IN_A_ROW = 2
#: Nodes that may go under a unit before it is suspected of being the reason.
_NODES_LOST = 10
#: A replica idle for so long is given back; shorter than that, a next phase may well need it.
_IDLE_SECONDS = 5.0
#: Between phases, when the others that went would have to load their models again, too.
REST_SECONDS = 60.0


class ReplicaPool:
    """Runs units on between `minimum` and `maximum` replicas.

    Args:
        start: starts one replica actor.
        retries: attempts of a unit after its first one.
        shard_seconds: time limit of a shard's worth of work; a replica that exceeds it is killed.
        shards: how many shards' worth of work a unit is, 1 unless given.
        on_poll: called about once a second, and whenever a number changes, with the replicas that
            are up, and that are awaited.
        observer: told of the replicas' time with work, and of units that are tried again.
        going: asked about once a second for the ids of the nodes that are told to go.
        calls: how replicas are reached; Ray's actors unless given.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        *,
        minimum: int,
        maximum: int,
        retries: int,
        shard_seconds: float,
        shards: Callable[[Any], int] = lambda unit: 1,
        on_poll: Callable[[int, int], None] = lambda up, starting: None,
        observer: Observer | None = None,
        going: Callable[[], Collection[str]] = tuple,
        calls: Calls | None = None,
    ) -> None:
        self._start = start
        self._minimum, self._maximum = minimum, maximum
        self._retries = retries
        self._limit = lambda unit: shard_seconds * shards(unit)
        self._on_poll, self._going = on_poll, going
        self._observer: Observer = Silent() if observer is None else observer
        self._calls: Calls = RayCalls() if calls is None else calls
        self._replicas = Replicas(self._calls)
        self._queue = Queue([])
        self._start_failures = 0
        self._failed_start = self._start_after = float("-inf")
        self._replaced = 0  # broken replicas replaced since a unit last succeeded
        self._tended = float("-inf")
        self._told = (-1, -1)

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
        self._queue = Queue(units)
        self._on_result, self._on_failure = on_result, on_failure
        self._replicas.expect_others()
        self._nothing_at = self._calls.now()  # when there was nothing to hand out, last
        while self._queue or self._replicas.working:
            self._scale()
            self._hand_out()
            self._collect()
            self._tend()

    def rest(self) -> None:
        """To be called about once a second while there are no units: long idle replicas go, and
        those on nodes that are told to."""
        self._replicas.heed(self._going())
        self._release(self._calls.now() - REST_SECONDS)
        self._report()

    def close(self) -> None:
        """Stop every replica; what they committed stands."""
        replicas = self._replicas
        for replica in [*replicas.starting, *replicas.up, *replicas.leaving]:
            replicas.remove(replica)

    # --- replicas ---

    def _surplus(self) -> int:
        """How many replicas there are that the work does not need; negative: that it lacks."""
        needed = self._replicas.busy + len(self._queue)
        return len(self._replicas) - max(self._minimum, min(self._maximum, needed))

    def _scale(self) -> None:
        """Demand what the work needs, and withdraw at once what it does not need any more."""
        surplus = self._surplus()
        if self._calls.now() >= self._start_after:
            for _ in range(-surplus):
                self._replicas.start(self._start())
        # Demand that was never met, the latest first, so that the cluster can shrink. Replicas that
        # are up go later, if they have no work.
        starting = self._replicas.starting
        for _ in range(min(surplus, len(starting))):
            self._replicas.remove(next(reversed(starting)))

    def _release(self, since: float) -> None:
        """Give back replicas that have had nothing to do since then; never one at work."""
        idle = [replica for replica in self._replicas.room[0] if replica.idle_since < since]
        for replica in idle[: max(0, self._surplus())]:
            self._replicas.remove(replica)

    def _doubt(self, replica: Replica) -> None:
        """A unit raised on this replica; one that fails every unit is replaced."""
        replica.failures_in_a_row += 1
        if replica.failures_in_a_row < _FAILURES_IN_A_ROW:
            return
        # Replicas that fail one after the other, without any success, are not what is broken.
        if self._replaced >= self._maximum:
            return
        self._replaced += 1
        self._replicas.remove(replica)
        self._again(self._unfinished(replica))

    def _again(self, attempts: list[Attempt]) -> None:
        """Back to the head of the queue: their replica is gone."""
        for attempt in attempts:
            self._observer.retried(attempt.unit)
        self._queue.put_back(attempts)

    def _count(self, replica: Replica, unit: Any) -> None:
        """The time since the replica's last answer, or since it was given work, was this unit's.

        It counts where the replica waited for the driver as well: only where there was nothing
        that it could have been given does no unit have its time.
        """
        now = self._calls.now()
        self._observer.held(unit, now - replica.counted)
        replica.counted = now

    def _lost(self, replica: Replica, error: BaseException, late: Sequence[Attempt] = ()) -> None:
        """A replica is gone: its units go back, and the culprit is looked for.

        A node that goes is no unit's doing, up to a number of times.

        Args:
            late: units that exceeded the time limit, if that is why.
        """
        told_to_go = replica in self._replicas.leaving and isinstance(error, RayActorError)
        blameless = told_to_go or self._calls.node_went(error, replica.node)
        self._replicas.remove(replica)
        if not replica.ready and not blameless:
            self._failed_to_start(replica, error)
        attempts = self._unfinished(replica)
        for attempt in attempts:
            attempt.nodes_lost += blameless
        blamed = [a for a in attempts if not blameless or a.nodes_lost > _NODES_LOST]
        culprit = blamed[0] if len(blamed) == len(attempts) == 1 else self._latest(late)
        others = [attempt for attempt in attempts if attempt is not culprit]
        for attempt in blamed:
            if attempt is not culprit:
                attempt.suspect = culprit is None
        self._again(others)
        if culprit is not None and culprit in attempts:
            culprit.suspect = culprit.suspect or bool(late)
            self._retry(culprit, error)

    def _latest(self, late: Sequence[Attempt]) -> Attempt | None:
        """Which of the units that exceeded the time limit of their replica is charged for it.

        Surely the only one. Of several the first: the others wait behind it, as a rule. It is not
        given up for that, but tried alone, if it has no other attempt left.
        """
        sure = len(late) == 1 or (bool(late) and late[0].failures < self._retries)
        return late[0] if sure else None

    def _failed_to_start(self, replica: Replica, error: BaseException) -> None:
        """Replicas that die together, with their node, count as one; those that never come up end
        the job, unless others are up: then the next ones wait a moment."""
        if replica.started < self._failed_start:
            return
        self._failed_start = self._calls.now()
        self._start_failures += 1
        if self._replicas.up:
            self._start_after = self._failed_start + retry_pause(self._start_failures)
        elif self._start_failures >= _START_FAILURES:
            raise InputError(
                f"replicas: {self._start_failures} times in a row replicas died before they were "
                f"up; the last one: {text_of(error)}"
            ) from error

    def _unfinished(self, replica: Replica) -> list[Attempt]:
        """Units of a replica that is gone, without those whose answer came before."""
        flying = replica.in_flight.items()
        left = [attempt for answer, attempt in flying if not self._came(replica, attempt, answer)]
        if left:
            self._count(replica, left[0].unit)
        return left

    def _came(self, replica: Replica, attempt: Attempt, answer: Answer) -> bool:
        """Whether a unit's answer came before its replica went; it is reported then."""
        if not answer.done():
            return False
        try:
            value = answer.result()
        except RayError:
            return False
        self._count(replica, attempt.unit)
        self._on_result(attempt.unit, value)
        return True

    # --- units ---

    def _hand_out(self) -> None:
        """The emptiest replicas first, so that units spread over them before they queue up.

        A unit that is tried alone waits for an empty replica; for every such unit one replica is
        given nothing more until it has finished what it has.
        """
        queue, replicas = self._queue, self._replicas
        queue.wake(self._calls.now())
        emptying = 0
        for level in replicas.room:
            if queue.idle:
                return
            for replica in list(level):
                may = replicas.may_have(replica)
                if replica.in_flight and emptying < queue.suspects and queue.has_suspect(may):
                    emptying += 1
                    continue
                attempt = None if replica.in_flight else queue.take(may, suspect=True)
                attempt = attempt or queue.take(may)
                if attempt is not None:
                    if not replica.in_flight:
                        replica.counted = max(replica.counted, self._nothing_at)
                    replicas.give(replica, attempt)
                elif queue.idle:
                    return

    def _collect(self) -> None:
        until_one_wakes = max(0.0, self._queue.wakes_at() - self._calls.now())
        answers = self._calls.arrived(min(_POLL_SECONDS, until_one_wakes))
        if not self._queue:
            self._nothing_at = self._calls.now()
        for answer in answers:
            replica = self._replicas.answered(answer)
            if replica is not None:
                self._settle(replica, answer)

    def _settle(self, replica: Replica, answer: Answer) -> None:
        try:
            value = answer.result()
        except RayTaskError as error:
            self._raised(replica, answer, error)
            return
        except RayError as error:
            # It died, or it lives on in an unknown state (out of memory, connection lost).
            self._lost(replica, error)
            return
        if not replica.ready:
            self._replicas.came_up(replica, _node_of(value))
            self._start_failures = 0
            return
        replica.failures_in_a_row = self._replaced = 0
        unit = self._replicas.finished(replica, answer).unit
        self._count(replica, unit)
        self._on_result(unit, value)

    def _raised(self, replica: Replica, answer: Answer, error: RayTaskError) -> None:
        """A unit raised: bad input ends the job, anything else does not."""
        cause = cause_of(error)
        if isinstance(cause, InputError):
            raise cause from error
        attempt = self._replicas.finished(replica, answer)
        self._count(replica, attempt.unit)
        if isinstance(cause, UnitError):
            self._on_failure(attempt.unit, attempt.failures + 1, str(cause))
            return
        if isinstance(cause, InfluenceError):  # the store's fault, and not the replica's
            attempt.not_before = self._calls.now() + retry_pause(attempt.failures + 1)
        else:
            attempt.failed_on.add(replica)
        self._retry(attempt, error)
        if not isinstance(cause, InfluenceError):
            self._doubt(replica)

    def _retry(self, attempt: Attempt, error: BaseException) -> None:
        attempt.failures += 1
        if attempt.failures > self._retries:
            self._on_failure(attempt.unit, attempt.failures, text_of(error))
        else:
            self._observer.retried(attempt.unit)
            self._queue.add(attempt, self._calls.now())

    # --- once a second ---

    def _tend(self) -> None:
        now = self._calls.now()
        if now - self._tended >= _POLL_SECONDS:
            self._tended = now
            self._enforce_time_limit(now)
            self._replicas.heed(self._going())
            self._release(now - _IDLE_SECONDS)
            self._report()
        elif self._told != self._replicas.counts:
            self._report()

    def _report(self) -> None:
        self._told = self._replicas.counts
        self._on_poll(*self._told)

    def _enforce_time_limit(self, now: float) -> None:
        for replica in [*self._replicas.up, *self._replicas.leaving]:
            flying = replica.in_flight.values()
            late = [each for each in flying if now - each.since > self._limit(each.unit)]
            if late:
                limit = self._limit(late[0].unit)
                text = f"not finished in {limit:g} s (replicas.shard_seconds)"
                self._lost(replica, TimeoutError(text), late)


def _node_of(answer: Any) -> str | None:
    """Where a replica is, from its first answer."""
    match answer:
        case (str(node), _):
            return node
    return None
