"""Nodes that go: which ones are told to, and whether a replica was lost because its node went."""

from __future__ import annotations

import time
from collections.abc import Collection

import ray
from ray._private.state import state
from ray.exceptions import ActorDiedError, ActorUnavailableError

#: Between two questions. A spot node has 30 s (GCP, Azure) or 120 s (AWS) from its notice on.
EVERY_SECONDS = 2.0
_NODE_DIED = "node has died"


class GoingNodes:
    """Ids of the nodes that get no new work: `ray drain-node`, or a notice that a provider passed
    on. Asks Ray every few seconds at most."""

    def __init__(self) -> None:
        self._asked = -EVERY_SECONDS
        self._found: Collection[str] = ()

    def __call__(self) -> Collection[str]:
        now = time.monotonic()
        if now - self._asked >= EVERY_SECONDS:
            # As Ray Data and Ray Train ask: the public interface needs the dashboard's server.
            self._asked, self._found = now, set(state.get_draining_nodes())
        return self._found


def node_went(error: BaseException, node: str | None) -> bool:
    """Whether a replica on `node` (None: not known yet) was lost because its node went.

    An actor that cannot be reached, and of which Ray does not know that it died, is one on a node
    that is gone: it takes Ray some 15 s to be sure of that.
    """
    if isinstance(error, ActorUnavailableError):
        return True
    if not isinstance(error, ActorDiedError):
        return False
    if _NODE_DIED in str(error) or getattr(error, "preempted", False):
        return True
    return any(each["NodeID"] == node and not each["Alive"] for each in ray.nodes())
