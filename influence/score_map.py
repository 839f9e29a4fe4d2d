"""The map from embeddings to scores, and other maps over shards, over a run's replicas."""

from __future__ import annotations

from collections.abc import Sequence

from influence.cache import Cache
from influence.job import Job, raise_failures, timed
from influence.score_shards import score_units, scoring_url
from influence.units import Bundle, Unit, bundled
from influence.worker import UnitResult


def map_scores(job: Job, embedding: Sequence[Unit], predictor: str) -> list[Unit]:
    """Scores of every candidate by a predictor; returns the units of their shards.

    Raises:
        ShardsFailedError: a shard failed for good (all others are committed).
    """
    units = score_units(embedding, predictor)
    map_units(job, units)
    return units


def map_units(job: Job, units: Sequence[Unit]) -> None:
    """Compute what is missing of units of one stage whose results belong to this run alone.

    Raises:
        ShardsFailedError: a shard failed for good (all others are committed).
    """
    if job.execute is None:
        raise RuntimeError("units to compute, but no executor: call select, or set job.execute")
    cache = Cache(scoring_url(job.config.run))
    stage = units[0].stage
    with timed(job, stage, quiet=True):
        job.log.took(stage, 0.0)
        present = cache.present([unit.key for unit in units])
        whole = cache.verify(sorted(present))
        for key in sorted(present - whole):
            job.log.damaged(stage, key)
            job.progress.note(f"damaged shard, computed again: {key}")
        missing = [unit for unit in units if unit.key not in whole]

        def on_result(bundle: Bundle, results: list[UnitResult]) -> None:
            del bundle, results
            job.progress.tick()

        def on_failure(bundle: Bundle, attempts: int, error: str) -> None:
            for unit in bundle.units:
                job.log.failed(unit, attempts, error)
                job.progress.failed(unit, error)

        if missing:
            job.execute(bundled(missing), on_result, on_failure)
    raise_failures(job)
