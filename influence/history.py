"""What runs leave in a cache for later plans: how fast they were, and what their rounds asked for.

One small JSON document for each run directory, below `history/` in the cache. Nothing that a run
computes depends on them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from influence import storage
from influence.config_content import content_values
from influence.errors import InfluenceError
from influence.fingerprints import fingerprint
from influence.job import Job
from influence.optimizer_use import scaled_stages
from influence.plan_schemas import Measured
from influence.quantities import Decided
from influence.records import to_json
from influence.stored import Stored

FOLDER = "history"
# Documents that a plan reads at most, the newest ones.
_READ = 32
# Of a config: what no run's rounds depend on, but for what the stages' fingerprints say of it.
_UNASKED = {
    "run",
    "cache",
    "prices",
    "model",
    "reference",
    "warmup",
    "finetune",
    "evaluation",
    "coverage",
    "transfer",
}


def recall(cache: str) -> list[Measured]:
    """What runs on this cache measured, the newest first; documents of other versions left out."""
    listed = storage.list_objects(storage.join(cache, FOLDER))
    newest = sorted(listed, key=lambda info: info.modified, reverse=True)[:_READ]
    found = [each for info in newest if (each := _read(info.url)) is not None]
    return sorted(found, key=lambda each: each.finished, reverse=True)


def _read(url: str) -> Measured | None:
    """A document; None if it is gone, or none of this version: a plan does without it."""
    try:
        return Measured.model_validate_json(storage.read_bytes(url))
    except (ValidationError, InfluenceError):
        return None


def remember(cache: str, measured: Measured) -> None:
    """Keep a measurement; what an earlier one of the same source knows of other stages stays.

    Raises:
        InfluenceError: the store failed or refused.
    """
    name = hashlib.blake2b(measured.source.encode(), digest_size=8).hexdigest()
    url = storage.join(cache, FOLDER, f"{name}.json")
    before = None if storage.head(url) is None else _read(url)
    if before is not None and before.replica == measured.replica:
        update: dict[str, Any] = {"stages": {**before.stages, **measured.stages}}
        if measured.set_up_seconds is None:
            update["set_up_seconds"] = before.set_up_seconds
        measured = measured.model_copy(update=update)
    storage.put(url, to_json(measured))


def now() -> str:
    """The time, as documents hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def decision_digest(job: Job) -> str:
    """Digest of everything that decides which rows a run's rounds, or its pilot, ask for."""
    # Those of inner products come with the targets' gradients, which are decided by the rest.
    prints = {k: v for k, v in job.fingerprints.items() if k != "inner_products"}
    values = content_values(job.config, prints, job.files, job.target_files, without=_UNASKED)
    values["replicas"] = job.config.replicas.gradient_rows_per_shard
    if not scaled_stages(job.config):
        values["optimizer"] = {"state": None, "kind": "sgd"}
    return fingerprint(values).hex


def decided(job: Job, history: Sequence[Measured]) -> Decided | None:
    """The rounds of an earlier run that asked for the same rows, if all of them are there."""
    digest = decision_digest(job)
    for run in history:
        if run.decided != digest or not run.maps:
            continue
        if len(Stored(job.cache).sizes(run.exact)) == len(set(run.exact)):
            return Decided(run.source, tuple(run.exact), run.exact_rows, run.maps)
    return None
