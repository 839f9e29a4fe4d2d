"""`influence select` whose workers write down what they compute: counted_driver.py LOG CONFIG ...

A script, so that its classes travel to Ray's workers by value.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import influence.local
from influence import lease
from influence.cli import main
from influence.config import Config
from influence.units import Bundle, Unit
from influence.worker import UnitResult, Worker


def counted(worker: Worker, log: str) -> Worker:
    """The same worker; every unit that it begins to compute is a line in the log."""

    def noted(compute: Callable[[Unit], Any]) -> Callable[[Unit], Any]:
        def run(unit: Unit) -> Any:
            line = json.dumps({"key": unit.key, "time": time.time(), "pid": os.getpid()})
            with open(log, "a") as file:
                file.write(line + "\n")
            return compute(unit)

        return run

    worker._read = noted(worker._read)  # type: ignore[method-assign]
    compared = worker._contamination
    compared.run = noted(compared.run)  # type: ignore[method-assign]
    return worker


def use_counted_replicas(log: str) -> None:
    """Replicas on Ray that are counted."""
    import ray

    from ray_jobs import select
    from ray_jobs.replica_actor import IN_FLIGHT

    class Counted:
        def __init__(self, document: dict[str, Any], log: str) -> None:
            self.worker = counted(Worker(Config.model_validate(document)), log)

        def ready(self) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), os.getpid()

        def run(self, bundle: Bundle) -> list[UnitResult]:
            return self.worker.run(bundle)

    def factory(config: Config) -> Any:
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(Counted)
        options = actor.options(num_cpus=config.replicas.num_cpus, max_concurrency=IN_FLIGHT + 1)
        return lambda: options.remote(config.model_dump(mode="json"), log)

    select.replica_factory = factory


if __name__ == "__main__":
    _, written, *arguments = sys.argv
    lease.TRUST_SECONDS = float(os.environ.get("LEASE_TRUST_SECONDS", lease.TRUST_SECONDS))
    if "--in-process" in arguments:
        influence.local.Worker = lambda config: counted(Worker(config), written)  # type: ignore
    else:
        use_counted_replicas(written)
    main(["select", *arguments])
