"""What to tell a user whose replicas find no place on the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray

EVERY_SECONDS = 60.0


class PlacementWatch:
    """Says once a minute what is demanded and what there is, as long as no replica is up.

    Args:
        demand: resources of one replica, by Ray's names: {"CPU": 4, "GPU": 1}.
        note: prints a line.
        every: seconds before the first line, and between lines.
    """

    def __init__(
        self,
        demand: Mapping[str, float],
        note: Callable[[str], None],
        every: float = EVERY_SECONDS,
    ) -> None:
        self._demand, self._note, self._every = demand, note, every
        self._since: float | None = None
        self._told = 0.0

    def look(self, up: int, starting: int) -> None:
        """Called at every poll with the number of replicas that are up and that are awaited."""
        now = time.monotonic()
        if up or not starting:
            self._since = None
            return
        if self._since is None:
            self._since = self._told = now
        if now - self._told < self._every:
            return
        self._told = now
        self._note(
            f"no replica is up after {now - self._since:.0f} s: {starting} wanted with "
            f"{_listing(self._demand, self._demand)} each (replicas.num_cpus, replicas.num_gpus); "
            f"the cluster has {_listing(ray.cluster_resources(), self._demand)}, "
            f"of which free {_listing(ray.available_resources(), self._demand)}"
        )


def _listing(amounts: Mapping[str, float], names: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amounts.get(name, 0):g}" for name in names)
