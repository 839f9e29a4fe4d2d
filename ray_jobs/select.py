"""The select job: `python -m ray_jobs.select CONFIG`, which is what `ray job submit` calls."""

from __future__ import annotations

from typing import Any

from influence.config import Config
from influence.errors import InterruptedRunError
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.report import build_report
from influence.resume import claim_run
from influence.run_log import read_manifest
from influence.schemas import to_json
from influence.storage import join, put
from ray_jobs.actors import RemoteReducer, replica_factory
from ray_jobs.pool import ReplicaPool
from ray_jobs.session import ray_session


def run_select(config: Config, *, replace: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Select on Ray and write the report; returns the reducer's summary.

    Raises:
        InfluenceError: see `influence.errors` for the kinds and their exit codes.
    """
    claim_run(config, replace=replace)
    progress = Progress(quiet=quiet)
    job = prepare(config, progress)
    with ray_session(config):
        pool = ReplicaPool(
            replica_factory(config),
            minimum=config.replicas.min,
            maximum=config.replicas.max,
            retries=config.replicas.retries,
            shard_seconds=config.replicas.shard_seconds,
            on_replicas=lambda count: setattr(progress, "replicas", count),
        )
        try:
            summary = select(job, pool, RemoteReducer(config))
        except InterruptedRunError:
            _mark_interrupted(config)
            raise
        finally:
            pool.close()
    summary["report"] = build_report(config.run)
    return summary


def _mark_interrupted(config: Config) -> None:
    manifest = read_manifest(config.run)
    if manifest is not None:
        manifest.state = "interrupted"
        put(join(config.run, "manifest.json"), to_json(manifest))


if __name__ == "__main__":
    import sys

    from influence.cli import main

    main(["select", *sys.argv[1:]])
