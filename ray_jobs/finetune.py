"""The fine-tuning job on Ray Train: `python -m ray_jobs.finetune CONFIG`.

Every worker runs `influence.finetune_job.train` in a process group of torch; rank 0 commits the
checkpoints. When a worker is lost, all start again and go on from the newest one: as often as that
brings a new checkpoint, which is more than Ray Train's count of failures could tell.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from influence.checkpoints import Checkpoints
from influence.config import Config
from influence.errors import (
    InfluenceError,
    InputError,
    InterruptedRunError,
    StorageError,
    WorkersLostError,
)
from influence.finetune_job import FinetuneJob, claim, prepare_finetune, train
from influence.hub import resolve_revision
from influence.lease import driving
from influence.replica import choose_device
from influence.training_progress import TrainingProgress, Watcher
from influence.training_record import TrainingRecord, read_record
from ray_jobs.session import ray_session
from ray_jobs.task_errors import text_of

_POLL_SECONDS = 0.5
#: How long the driver waits for workers that it told to stop.
_STOP_SECONDS = 2.0


def run_finetune(config: Config, *, replace: bool = False, quiet: bool = False) -> TrainingRecord:
    """Fine-tune on Ray Train; returns the record, also of a training that was done before.

    Raises:
        InfluenceError: see `influence.errors` for the kinds and their exit codes.
    """
    config = resolve_revision(config)
    watcher = TrainingProgress(quiet=quiet)
    job = prepare_finetune(config, watcher)
    with driving(job.output, watcher.note) as lease:
        watcher.check = lease.check
        return claim(job, watcher, replace=replace) or train_on_ray(job, config, watcher)


def train_on_ray(job: FinetuneJob, config: Config, watcher: Watcher) -> TrainingRecord:
    """Train with `finetune.workers` workers; see `run_finetune`."""
    try:
        with ray_session(config, config.finetune.workers):
            _until_done(job, config, watcher)
    finally:
        watcher.end()
    record = read_record(job.output)
    if record is None or not record.done:
        raise WorkersLostError(
            f"{job.output}: the workers ended, but their result is not there; is it a place that "
            "every node sees? Use s3://... or a shared folder for `run` or finetune.output"
        )
    return record


@ray.remote(max_restarts=0)
class Mailbox:
    """Takes what the workers have to say to the driver, and tells them when to stop."""

    def __init__(self) -> None:
        self._events: list[tuple[str, tuple]] = []
        self._stop: BaseException | None = None

    def put(self, event: str, arguments: tuple) -> BaseException | None:
        """Keep a call for the driver's watcher; returns why to stop, if so."""
        self._events.append((event, arguments))
        return self._stop

    def why_stop(self) -> BaseException | None:
        """An error that would meet every other attempt too, or an interruption."""
        return self._stop

    def stop(self, why: BaseException) -> None:
        """No attempt has a point from now on; the first reason stays."""
        self._stop = self._stop or why

    def take(self) -> tuple[list[tuple[str, tuple]], BaseException | None]:
        """(what has come since the last call, why to stop)."""
        events, self._events = self._events, []
        return events, self._stop


class RemoteWatcher:
    """A worker's watcher: what it is told goes to the driver's. Never waits for the driver."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._answer: Any = None

    def _tell(self, event: str, *arguments: Any) -> None:
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            why: BaseException | None = ray.get(ready[0]) if ready else None
            if why is not None:
                raise why
        self._answer = self._mailbox.put.remote(event, arguments)

    def begin(self, done: int, total: int, per_epoch: int) -> None:
        self._tell("begin", done, total, per_epoch)

    def step(self, done: int, loss: float, tokens: int, seconds: float) -> None:
        self._tell("step", done, loss, tokens, seconds)

    def evaluating(self, name: str, done: int, total: int) -> None:
        self._tell("evaluating", name, done, total)

    def note(self, text: str) -> None:
        self._tell("note", text)

    def end(self) -> None:
        """The driver's own ends when the job does."""


def worker(config: dict[str, Any]) -> None:
    """One worker's part of the training; Ray Train has made the process group."""
    mailbox = config["mailbox"]
    if ray.get(mailbox.why_stop.remote()) is not None:
        return  # Ray Train itself starts workers again whose node is taken away
    job: FinetuneJob = ray.get(config["job"][0])
    try:
        train(job, choose_device(job.model.device, config["num_gpus"]), RemoteWatcher(mailbox))
    except InputError as error:
        # It would meet every further attempt as well.
        ray.get(mailbox.stop.remote(error))
        raise


def _until_done(job: FinetuneJob, config: Config, watcher: Watcher) -> None:
    """Attempts, until one succeeds or `replicas.retries` more in a row bring no new checkpoint."""
    checkpoints = Checkpoints(job.output)
    failed, newest = 0, max(checkpoints.steps(), default=0)
    while True:
        try:
            return _attempt(job, config, watcher)
        except WorkersLostError as error:
            before, newest = newest, max(checkpoints.steps(), default=0)
            failed = 1 if newest > before else failed + 1
            if failed > config.replicas.retries:
                raise
            watcher.note(f"{error}; all workers start again")


def _attempt(job: FinetuneJob, config: Config, watcher: Watcher) -> None:
    """Start the workers, pass on what they say, and wait for their end.

    Ray Train waits in a thread: in the main one it would take over SIGINT, and a stop signal could
    not be told from a failure.
    """
    node = ray.get_runtime_context().get_node_id()
    mailbox = Mailbox.options(  # pyright: ignore[reportAttributeAccessIssue]
        num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    ).remote()
    with tempfile.TemporaryDirectory(prefix="ray-train-") as folder:
        trainer = _trainer(job, config, mailbox, folder)
        fit = _Fit(trainer)
        fit.thread.start()
        why: BaseException | None = None
        try:
            while fit.thread.is_alive() and why is None:
                fit.thread.join(_POLL_SECONDS)
                why = _pass_on(mailbox, watcher)
        except KeyboardInterrupt:
            _stop(mailbox, fit)
            raise
        why = why or _pass_on(mailbox, watcher)
        if why is not None:
            fit.thread.join(_STOP_SECONDS)
            raise why
        if fit.error is not None:
            raise _explained(fit.error)


class _Fit:
    """Runs `trainer.fit()` in a thread, and keeps its error."""

    def __init__(self, trainer: Any) -> None:
        self.error: BaseException | None = None
        self._trainer = trainer
        self.thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # also the SystemExit of a Ray that is shut down
            self.error = error


def _trainer(job: FinetuneJob, config: Config, mailbox: Any, folder: str) -> Any:
    # A worker's folder stays the driver's, so that relative paths mean the same.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise InputError(
            f"finetune: Ray Train lacks a package ({error.__cause__ or error}); pip install "
            "'ray[train]' on every node, or run with --in-process"
        ) from error
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    replicas = config.replicas
    resources: dict[str, float] = {"CPU": replicas.num_cpus}
    if replicas.num_gpus:
        resources["GPU"] = replicas.num_gpus
    return TorchTrainer(
        worker,
        train_loop_config={
            # In a list the reference stays one, and every node fetches the rows once.
            "job": [ray.put(job)],
            "mailbox": mailbox,
            "num_gpus": replicas.num_gpus,
        },
        scaling_config=ScalingConfig(
            num_workers=config.finetune.workers,
            use_gpu=replicas.num_gpus > 0,
            resources_per_worker=resources,
        ),
        # Our own checkpoints are in job.output; Ray Train keeps no more than its own state here.
        run_config=RunConfig(
            name="finetune",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _pass_on(mailbox: Any, watcher: Watcher) -> BaseException | None:
    """Tell the watcher what the workers said; returns why to stop, if so."""
    events, why = ray.get(mailbox.take.remote())
    for event, arguments in events:
        getattr(watcher, event)(*arguments)
    return why


def _stop(mailbox: Any, fit: _Fit) -> None:
    """Tell the workers: they end at their next step, and when they start again, at once."""
    with suppress(RayError):
        ray.get(mailbox.stop.remote(InterruptedRunError("the driver was told to stop")))
    deadline = time.monotonic() + _STOP_SECONDS
    while fit.thread.is_alive() and time.monotonic() < deadline:
        fit.thread.join(_POLL_SECONDS)


def _explained(error: BaseException) -> BaseException:
    """What ended an attempt, out of Ray Train's error."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for each in failures.values():
        if isinstance(each, InfluenceError) and not isinstance(each, StorageError):
            return each
    rank, first = next(iter(failures.items()))
    return WorkersLostError(
        f"worker {rank} was lost ({text_of(first)}); committed checkpoints stand, and the same "
        "command goes on from the newest"
    )


if __name__ == "__main__":
    import sys

    from influence.cli import main

    main(["finetune", *sys.argv[1:]])
