"""The evaluate job: `python -m ray_jobs.evaluate CONFIG`, which is what `ray job submit` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from influence.config import Config
from influence.evaluate import evaluate
from influence.evaluations import Evaluation
from influence.job import Execute, Job, SelectRun
from ray_jobs.metrics import RayMetrics
from ray_jobs.reducer_actor import RemoteReducer
from ray_jobs.select import replica_pool, run_select, train
from ray_jobs.session import ray_session


def run_evaluate(config: Config, *, replace: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Evaluate on Ray; returns the document of RUN/evaluation.json.

    Raises:
        InfluenceError: see `influence.errors` for the kinds and their exit codes.
    """
    return evaluate(
        config, lambda: ray_session(config), _workers, train, replace=replace, quiet=quiet
    )


@contextmanager
def _workers(job: Job, evaluation: Evaluation) -> Iterator[tuple[Execute, Any, SelectRun]]:
    metrics = RayMetrics(job.config.run)
    job.watch.others.append(metrics)
    pool = replica_pool(job)

    def select_run(
        config: Config, *, after: Callable[[Job, Any], None] = lambda job, reduce: None
    ) -> dict[str, Any]:
        pool.close()  # idle replicas would keep what those of the run wait for
        return run_select(config, replace=True, quiet=True, after=after)

    try:
        yield pool, RemoteReducer(job.config, pool.rest, evaluation.reducer), select_run
    finally:
        pool.close()
        metrics.replicas(0, 0)


if __name__ == "__main__":
    import sys

    from influence.cli import main

    main(["evaluate", *sys.argv[1:]])
