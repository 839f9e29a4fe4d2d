"""What the pool asks of Ray and of the clock, so that a simulation can stand in for both."""

from __future__ import annotations

import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import ray

from ray_jobs.nodes import node_went


class Answer(Protocol):
    """What a replica will have said: a value, or the error that Ray has instead."""

    def done(self) -> bool:
        """Whether it is there."""
        ...

    def result(self) -> Any:
        """The value; raises Ray's error."""
        ...


class Calls(Protocol):
    """Everything that the pool asks of the world outside."""

    def ready(self, handle: Any) -> Answer:
        """Ask a replica to answer once it is up."""
        ...

    def run(self, handle: Any, unit: Any) -> Answer:
        """Give a replica a unit."""
        ...

    def arrived(self, seconds: float) -> list[Any]:
        """The answers that came since the last call; waits at most so long for the first one."""
        ...

    def kill(self, handle: Any) -> None:
        """Stop a replica, at work or not."""
        ...

    def node_went(self, error: BaseException, node: str | None) -> bool:
        """Whether a replica on a node (None: not known yet) was lost because its node went."""
        ...

    def now(self) -> float:
        """Seconds, increasing."""
        ...


class RayCalls:
    """Actors of a real cluster. Answers announce themselves: nobody looks through those awaited."""

    def __init__(self) -> None:
        self._arrived: SimpleQueue[Answer] = SimpleQueue()

    def ready(self, handle: Any) -> Answer:
        """See `Calls`."""
        return self._announced(handle.ready.remote())

    def run(self, handle: Any, unit: Any) -> Answer:
        """See `Calls`."""
        return self._announced(handle.run.remote(unit))

    def arrived(self, seconds: float) -> list[Any]:
        """See `Calls`."""
        found: list[Any] = []
        with suppress(Empty):
            found.append(self._arrived.get(timeout=seconds))
            while True:
                found.append(self._arrived.get_nowait())
        return found

    def kill(self, handle: Any) -> None:
        """See `Calls`."""
        ray.kill(handle)

    def node_went(self, error: BaseException, node: str | None) -> bool:
        """See `Calls`."""
        return node_went(error, node)

    def now(self) -> float:
        """See `Calls`."""
        return time.monotonic()

    def _announced(self, reference: Any) -> Answer:
        answer = reference.future()
        answer.add_done_callback(self._arrived.put)  # on a thread of Ray's
        return answer
