"""Which replicas a pool has: awaited or up, with room for a unit or not, and whose an answer is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from ray_jobs.attempts import Attempt
from ray_jobs.calls import Answer, Calls
from ray_jobs.replica_actor import IN_FLIGHT

#: A unit that takes longer waits in the queue, where any replica can have it, and not behind
#: another one: what the overlap hides of it (tokenising, writing) is less than what waiting costs.
QUICK_SECONDS = 10.0


@dataclass(eq=False)
class Replica:
    """One actor, and what it has been given."""

    handle: Any
    up: Answer
    started: float
    ready: bool = False
    # Where it is, once it is up.
    node: str | None = None
    failures_in_a_row: int = 0
    idle_since: float = 0.0
    # Until when its time is accounted for.
    counted: float = 0.0
    in_flight: dict[Answer, Attempt] = field(default_factory=dict)
    # How long its last unit took; not known before the first one of the units at hand.
    took: float = float("inf")

    @property
    def alone(self) -> bool:
        """Whether it has a unit that is tried alone."""
        return any(attempt.suspect for attempt in self.in_flight.values())


class Replicas:
    """The replicas of a pool. Nothing here but `start` and `remove` concerns more than one of them.

    Attributes (dictionaries without values are sets that keep their order):
        starting: those that are awaited, the oldest first.
        up: those that are up, without the leaving ones.
        leaving: those on nodes that are told to go: they finish what they have.
        room: those that can take one more unit, by the number that they have; behind another unit
            only where the last one was quick.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.starting: dict[Replica, None] = {}
        self.up: dict[Replica, None] = {}
        self.leaving: dict[Replica, None] = {}
        self.room: tuple[dict[Replica, None], ...] = tuple({} for _ in range(IN_FLIGHT))
        self._asked: dict[Answer, Replica] = {}

    def __len__(self) -> int:
        """How many there are to count on."""
        return len(self.starting) + len(self.up)

    @property
    def counts(self) -> tuple[int, int]:
        """How many are up, and how many are awaited."""
        return len(self.up) + len(self.leaving), len(self.starting)

    @property
    def working(self) -> bool:
        """Whether an answer to a unit is awaited."""
        return self.busy > 0 or any(replica.in_flight for replica in self.leaving)

    @property
    def busy(self) -> int:
        """How many have something to do and are to be counted on."""
        return len(self.up) - len(self.room[0])

    def expect_others(self) -> None:
        """Other units come, of which it is not known how long they take."""
        for replica in (*self.up, *self.leaving):
            replica.took = float("inf")

    def start(self, handle: Any) -> None:
        """Await a new one."""
        replica = Replica(handle, self._calls.ready(handle), self._calls.now())
        self.starting[replica] = None
        self._asked[replica.up] = replica

    def came_up(self, replica: Replica, node: str | None) -> None:
        """An awaited one is there."""
        replica.ready, replica.node = True, node
        replica.idle_since = replica.counted = self._calls.now()
        del self.starting[replica]
        self.up[replica] = None
        self._file(replica)

    def heed(self, going: Collection[str]) -> None:
        """Nodes are told to go: what is there gets no new work, and goes once it has none."""
        for replica in [*self.leaving]:
            if replica.node not in going:
                self.up[replica] = None
                del self.leaving[replica]
                self._file(replica)
        for replica in [each for each in self.up if each.node in going]:
            del self.up[replica]
            self.leaving[replica] = None
            self._file(replica)
        for replica in [each for each in self.leaving if not each.in_flight]:
            self.remove(replica)

    def give(self, replica: Replica, attempt: Attempt) -> None:
        """Give it a unit."""
        attempt.since = self._calls.now()
        answer = self._calls.run(replica.handle, attempt.unit)
        replica.in_flight[answer] = attempt
        self._asked[answer] = replica
        self._file(replica)

    def answered(self, answer: Answer) -> Replica | None:
        """Whose answer this is; None if nobody waits for it any more."""
        return self._asked.pop(answer, None)

    def finished(self, replica: Replica, answer: Answer) -> Attempt:
        """Take a unit off its replica; the clocks of the units that waited behind it start anew."""
        now = self._calls.now()
        answers = list(replica.in_flight)
        for behind in answers[answers.index(answer) + 1 :]:
            replica.in_flight[behind].since = now
        replica.idle_since = now
        attempt = replica.in_flight.pop(answer)
        replica.took = now - attempt.since
        self._file(replica)
        return attempt

    def remove(self, replica: Replica) -> None:
        """Stop one, dead or alive; no answer of it is awaited any more."""
        self._calls.kill(replica.handle)
        for group in (self.starting, self.up, self.leaving, *self.room):
            group.pop(replica, None)
        for answer in (replica.up, *replica.in_flight):
            self._asked.pop(answer, None)

    def may_have(self, replica: Replica) -> Callable[[Attempt], bool]:
        """Which units it may have: not those that raised on it, where there is another one."""

        def may(attempt: Attempt) -> bool:
            return replica not in attempt.failed_on or not any(
                other not in attempt.failed_on and not other.alone for other in self.up
            )

        return may

    def _file(self, replica: Replica) -> None:
        """Put one that is up where it belongs in `room`."""
        for level in self.room:
            level.pop(replica, None)
        flying = len(replica.in_flight)
        room = flying == 0 or (flying < IN_FLIGHT and replica.took <= QUICK_SECONDS)
        if room and replica in self.up and not replica.alone:
            self.room[flying][replica] = None
