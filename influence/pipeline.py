"""The select job, top to bottom: catalogue -> gradients and embeddings -> scores -> selection.

How units are executed (in this process, on a pool of actors) is handed in, and so is the reducer:
nothing here knows of Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from influence import storage
from influence.bill_record import begin_bill, end_bill, replicas_of
from influence.cache import Cache
from influence.candidates import SourceFile, scan_files
from influence.config import Config
from influence.contamination_units import contamination_print, guards_of
from influence.embeddings import check_embedding
from influence.errors import InputError
from influence.fingerprints import stage_fingerprints
from influence.job import Execute, Job, run_units, timed
from influence.methods import METHODS
from influence.missing_work import first_work
from influence.model_shape import model_shape
from influence.own_training import OwnTraining
from influence.pool_units import (
    catalogue_units,
    contamination_units,
    embedding_units,
    rds_target_units,
)
from influence.progress import Progress
from influence.records import Fidelity
from influence.replica import load_tokenizer
from influence.report_format import step_phrase
from influence.run_log import RunLog
from influence.score_shards import remove_scoring
from influence.tokenization import template_fingerprint
from influence.units import Unit
from influence.watch import Watch

__all__ = [
    "METHODS",
    "Execute",
    "Job",
    "catalogue",
    "catalogue_units",
    "embedding_units",
    "prepare",
    "prepare_targets",
    "rds_target_units",
    "scan_named",
    "select",
]


def select(job: Job, execute: Execute, reduce: Any) -> dict[str, Any]:
    """Run the whole job and write the run directory; returns the reducer's summary.

    `job` is of `prepare`; `reduce` is a `Reducer` or anything with its methods.

    Raises:
        InputError: bad config or data.
        ShardsFailedError: some shards failed for good; everything else is committed.
    """
    config, log = job.config, job.log
    method = METHODS[config.method]
    job = replace(job, execute=execute)
    storage.probe_create_only(config.cache_url)
    if method.needs_gradients:
        job.shape = model_shape(config)
        log.manifest.coverage = job.shape.coverage
        check_embedding(config, job.shape)
        if step := step_phrase(config.optimizer.kind, config.optimizer.state):
            job.progress.note(f"optimizer: scores are about {step}")
    log.save()
    with log.telling_the_end():
        before = first_work(job, replicas_of(job))
        pool, targets = catalogue(job)
        with timed(job, "catalogue"):
            log.manifest.counts = reduce.load_catalogue(pool, targets, contamination_units(job))
        job.tokens = reduce.tokens_of
        begin_bill(job, reduce, log.manifest.counts, *before)
        method.run(job, reduce)
        with timed(job, "selection"):
            # Where the results are written, which may be another process, the lease counts too.
            summary = reduce.select(None if log.lease is None else log.lease.owner)
        log.check()
        end_bill(job, summary["fidelity"]["recall"]["exact_gradients"])
        remove_scoring(config.run)
        log.manifest.counts = summary["counts"]
        log.manifest.objective = Fidelity.model_validate(summary["fidelity"]).objective
    log.finish("done")
    return summary


def prepare(
    config: Config,
    progress: Progress,
    log: RunLog | None = None,
    own: OwnTraining | None = None,
) -> Job:
    """Find the files and fingerprint every stage; loads the tokenizer, but no model.

    own: the training that the job makes, whose result the config has.

    Raises:
        InputError: files or model that are not there; nothing has been written then.
    """
    if own is not None:
        files = own.files
    else:
        files = scan_named("data.candidates", config.data.candidates, config.data.limit)
    return replace(prepare_targets(config, progress, log), files=files, own_training=own)


def prepare_targets(config: Config, progress: Progress, log: RunLog | None = None) -> Job:
    """As `prepare`, without the pool (`files` is empty, no byte of it is read): all fingerprints.

    Raises:
        InputError: target files or model that are not there.
    """
    target_files = {}
    for name, target in config.targets.items():
        target_files[name] = scan_named(f"targets.{name}.path", [target.path], target.limit)
    against = against_files(config)
    template = template_fingerprint(load_tokenizer(config.model))
    texts = contamination_print(config, guards_of(target_files, against))
    log = log if log is not None else RunLog(config.run, config.method, progress.note)
    log.manifest.cache = storage.absolute(config.cache_url)
    return Job(
        config,
        {**stage_fingerprints(config, template), **texts},
        [],
        target_files,
        Cache(config.cache_url),
        log,
        progress,
        Watch(log, progress),
        against=against,
    )


def against_files(config: Config) -> dict[str, list[SourceFile]]:
    """The files of `contamination.against`, by name.

    Raises:
        InputError: files that are not there.
    """
    section = config.contamination
    return {
        name: scan_named(
            f"contamination.against.{name}", [paths] if isinstance(paths, str) else paths, None
        )
        for name, paths in ({} if section is None else section.against).items()
    }


def scan_named(key: str, patterns: Sequence[str], limit: int | None) -> list[SourceFile]:
    """The files of a key of the config, which errors name."""
    try:
        return scan_files(patterns, limit)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def catalogue(job: Job) -> tuple[list[Unit], dict[str, list[Unit]]]:
    """Tokenise every row of the pool and the targets, and compare them (no model)."""
    pool, targets = catalogue_units(job)
    of_targets = [unit for units in targets.values() for unit in units]
    run_units(job, [*of_targets, *pool, *contamination_units(job)])
    return pool, targets
