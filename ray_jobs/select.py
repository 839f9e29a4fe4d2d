"""The select job: `python -m ray_jobs.select CONFIG`, which is what `ray job submit` calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import ray

from influence.config import Config
from influence.finetune_job import FinetuneJob
from influence.hub import resolve_revision
from influence.job import Job
from influence.lease import driving
from influence.methods import METHODS
from influence.own_training_run import make_training, train_here
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.reference import with_reference
from influence.report import build_report
from influence.resume import claim_run
from influence.run_log import RunLog
from influence.training_progress import Watcher
from influence.training_record import TrainingRecord
from influence.transfer import compare_models
from ray_jobs.finetune import train_on_ray
from ray_jobs.metrics import RayMetrics
from ray_jobs.nodes import GoingNodes
from ray_jobs.placement import PlacementWatch
from ray_jobs.pool import ReplicaPool
from ray_jobs.reducer_actor import RemoteReducer
from ray_jobs.replica_actor import replica_factory
from ray_jobs.session import ray_session


def run_select(
    config: Config,
    *,
    replace: bool = False,
    quiet: bool = False,
    after: Callable[[Job, Any], None] = lambda job, reduce: None,
) -> dict[str, Any]:
    """Select on Ray and write the report; returns the reducer's summary.

    `after` is called with the job and its reducer once the selection is written.

    Raises:
        InfluenceError: see `influence.errors` for the kinds and their exit codes.
    """
    if (check := METHODS[config.method].check_files) is not None:
        check(config)
    given, nested = config, {"replace": True, "quiet": quiet}
    config = resolve_revision(with_reference(config))
    progress = Progress(quiet=quiet)
    with driving(config.run, progress.note) as lease:
        claim_run(config, replace=replace)
        log = RunLog(config.run, config.method, progress.note, lease)
        config, own = make_training(config, progress, log, train)
        job = prepare(config, progress, log, own)
        with ray_session(config):
            metrics = RayMetrics(config.run)
            job.watch.others.append(metrics)
            pool = replica_pool(job)
            try:
                reduce = RemoteReducer(config, pool.rest)
                summary = select(job, pool, reduce)
                after(job, reduce)
            finally:
                pool.close()
                metrics.replicas(0, 0)
        lease.check()
        compare_models(given, job.files, progress, partial(run_select, **nested), train)
        summary["report"] = build_report(config.run)
    return summary


def train(job: FinetuneJob, config: Config, watcher: Watcher) -> TrainingRecord:
    """Train in this process where Ray would have nothing but this machine's cores, too."""
    alone = config.finetune.workers == 1 and not config.replicas.num_gpus
    if alone and not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return train_here(job, config, watcher)
    return train_on_ray(job, config, watcher)


def replica_pool(job: Job) -> ReplicaPool:
    """The pool of replicas that a job's config asks for."""
    settings = job.config.replicas
    demand = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
    placement = PlacementWatch({k: v for k, v in demand.items() if v}, job.progress.note)

    def on_poll(up: int, starting: int) -> None:
        job.watch.replicas(up, starting)
        placement.look(up, starting)

    return ReplicaPool(
        replica_factory(job.config),
        minimum=settings.min,
        maximum=settings.max,
        retries=settings.retries,
        shard_seconds=settings.shard_seconds,
        shards=attrgetter("shards"),
        on_poll=on_poll,
        observer=job.watch,
        going=GoingNodes(),
    )


if __name__ == "__main__":
    import sys

    from influence.cli import main

    main(["select", *sys.argv[1:]])
