"""A select run inside another job: for an evaluation that compares selections.

Each has a run directory, replicas and a record of its own, over the job's cache; what executes its
units, and its reducer, are those that the job was handed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from influence.config import Config
from influence.hub import resolve_revision
from influence.job import Execute, Job
from influence.lease import driving
from influence.own_training_run import Train, make_training
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.reducer import Reducer
from influence.reference import with_reference
from influence.resume import claim_run
from influence.run_log import RunLog

Workers = Callable[[Job, Callable[[Config], Any]], AbstractContextManager[tuple[Execute, Any]]]
"""What executes the units of a job, and the reducer that the function makes for it."""


@dataclass(frozen=True)
class Within:
    """What a job lends to select runs inside it.

    Attributes:
        workers: execute the units of such a run; one run at a time has any.
        train: makes a warm-up or a reference model that it asks for.
        progress: shows what goes on.
        replace: whether the results of another config may be replaced.
    """

    workers: Workers
    train: Train
    progress: Progress
    replace: bool

    def claim(self, config: Config) -> None:
        """Take the run's directory for the config.

        Raises:
            InputError: it belongs to a run with another config, and not `replace`.
        """
        claim_run(resolve_revision(with_reference(config)), replace=self.replace)

    def select(self, config: Config, after: Callable[[Job, Any], None]) -> None:
        """As `influence select`, without a report; cached shards are reused.

        after: is called with the run's job and reducer, once the selection is written.

        Raises:
            InputError: bad config or data, or the directory is another's.
            ShardsFailedError: some shards failed for good; everything else is committed.
        """
        config = resolve_revision(with_reference(config))
        with driving(config.run, self.progress.note) as lease:
            claim_run(config, replace=self.replace)
            log = RunLog(config.run, config.method, self.progress.note, lease)
            config, own = make_training(config, self.progress, log, self.train)
            job = prepare(config, self.progress, log, own)
            with self.workers(job, Reducer) as (execute, reduce):
                select(job, execute, reduce)
                after(job, reduce)
            lease.check()
