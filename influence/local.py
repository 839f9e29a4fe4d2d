"""Execute units in this process, one after the other: the same worker, no cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from influence.config import Config
from influence.errors import InfluenceError
from influence.pipeline import Execute
from influence.units import Bundle
from influence.worker import UnitResult, Worker


def local_execute(config: Config) -> Execute:
    """An executor for `influence.pipeline.select` that runs everything here.

    Errors of the package (bad data, a model that does not load) end the job; anything else is
    retried as often as the config says and then recorded as a failed shard.
    """
    worker = Worker(config)

    def execute(
        bundles: Sequence[Bundle],
        on_result: Callable[[Bundle, list[UnitResult]], None],
        on_failure: Callable[[Bundle, int, str], None],
    ) -> None:
        for bundle in bundles:
            attempts = config.replicas.retries + 1
            for attempt in range(1, attempts + 1):
                try:
                    results = worker.run(bundle)
                except InfluenceError:
                    raise
                except Exception as error:
                    if attempt == attempts:
                        on_failure(bundle, attempts, f"{type(error).__name__}: {error}")
                else:
                    on_result(bundle, results)
                    break

    return execute
