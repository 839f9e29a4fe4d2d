"""The evaluate job: the evaluations that a config names, each as a run of its own over one cache.

Results are gathered in RUN/evaluation.json. Nothing here knows of Ray: what executes units, and the
reducer, are handed in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace as replaced
from functools import partial
from typing import Any

from influence import storage
from influence.config import Config
from influence.errors import InputError
from influence.evaluation_tables import FILE, read_evaluation
from influence.evaluations import EVALUATIONS, Evaluation
from influence.hub import resolve_revision
from influence.job import Execute, Job, SelectRun
from influence.lease import driving
from influence.own_training import with_made_training
from influence.own_training_run import Train, make_training
from influence.pipeline import prepare
from influence.progress import Progress
from influence.reference import with_reference
from influence.report import build_report
from influence.resume import EVALUATION_FREE, claim_run
from influence.run_log import RunLog
from influence.score_shards import remove_scoring

Workers = Callable[[Job, Evaluation], AbstractContextManager[tuple[Execute, Any, SelectRun]]]
"""What executes the units of a job, the reducer that the evaluation asks for, and select runs."""


def evaluate(
    config: Config,
    session: Callable[[], AbstractContextManager[None]],
    workers: Workers,
    train: Train,
    *,
    replace: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run every evaluation that the config names; returns the document of RUN/evaluation.json.

    `train` makes a reference model that a config asks for (`reference.finetune`). A warm-up has to
    be there, of `influence select`.

    Raises:
        InputError: the config names none, one is of other settings than an earlier attempt, or its
            warm-up is not made.
        ShardsFailedError: some shards failed for good; everything else is committed.
    """
    chosen = named(config)
    own = {name: _settings(each, config) for name, each in chosen.items()}
    progress = Progress(quiet=quiet)
    with driving(config.run, progress.note) as lease:
        jobs, inputs = {}, {}
        for name, settings in own.items():
            claim_run(settings, replace=replace, free=EVALUATION_FREE)
            inputs[name] = chosen[name].inputs(settings)
            log = RunLog(settings.run, settings.method, progress.note, lease)
            settings, trained = make_training(settings, progress, log, train)
            jobs[name] = prepare(settings, progress, log, trained)
        with session():
            for name, job in jobs.items():
                progress.note(f"{name} ...")
                with workers(job, chosen[name]) as (execute, reduce, select_run):
                    job = replaced(job, execute=execute, select_run=select_run)
                    measure = partial(chosen[name].run, job, reduce, inputs[name])
                    _run(config.run, name, job, measure)
        lease.check()
        build_report(config.run)
    return read_evaluation(config.run)


def named(config: Config) -> dict[str, Evaluation]:
    """The evaluations that the config names.

    Raises:
        InputError: none.
    """
    found = {
        name: each
        for name, each in EVALUATIONS.items()
        if getattr(config.evaluation, name) is not None
    }
    if not found:
        raise InputError(
            "evaluation: names nothing to measure; known: "
            f"{', '.join(EVALUATIONS)}. For example: --set evaluation.fidelity.pilot=1000"
        )
    return found


def _settings(evaluation: Evaluation, config: Config) -> Config:
    if config.warmup is not None and not evaluation.as_written:
        # It has a method of its own, and is of the model that the run's scores are of.
        config = with_made_training(config)
    return resolve_revision(with_reference(evaluation.settings(config)))


def _run(run: str, name: str, job: Job, measure: Callable[[], dict[str, Any]]) -> None:
    """Run one evaluation and put its result beside those of the others."""
    storage.probe_create_only(job.config.cache_url)
    job.log.save()
    with job.log.telling_the_end():
        found = {**read_evaluation(run), name: measure()}
        job.log.check()
        storage.put(storage.join(run, FILE), json.dumps(found, indent=1).encode() + b"\n")
        remove_scoring(job.config.run)
    job.log.finish("done")
