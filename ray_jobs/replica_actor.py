"""The replica actor: computes units with a model of its own.

It imports nothing of the reducer: what a replica imports is what its start costs.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from influence.config import Config
from influence.units import Bundle
from influence.worker import UnitResult, Worker

#: Units in flight per replica: one tokenising, one in the model, one being written.
IN_FLIGHT = 3


@ray.remote(max_restarts=0, max_task_retries=0)
class ReplicaActor:
    """Holds one model replica. Dead replicas are replaced by the driver, never restarted by Ray."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.worker = Worker(Config.model_validate(config))

    def ready(self) -> tuple[str, int]:
        """(node id, process id), once the actor is up."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def run(self, bundle: Bundle) -> list[UnitResult]:
        """Compute and commit the units of one bundle."""
        return self.worker.run(bundle)


def replica_factory(config: Config) -> Any:
    """A function that starts one replica actor with the config's resources."""
    settings = config.replicas
    options = ReplicaActor.options(  # pyright: ignore[reportAttributeAccessIssue]
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        max_concurrency=IN_FLIGHT + 1,
    )
    document = config.model_dump(mode="json")
    return lambda: options.remote(document)
