"""Making a training of a run's own: fine-tuned once, whatever dies, for all runs on a cache.

How it is trained (in this process, by workers on a cluster) is handed in: nothing here knows of
Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from influence import storage
from influence.checkpoints import epoch_folder
from influence.config import Config
from influence.errors import InputError, RunBusyError
from influence.finetune_job import FinetuneJob, claim, prepare_finetune, settings_of, train
from influence.finetune_steps import Steps, epoch_rates
from influence.lease import Lease, driving
from influence.load import Load
from influence.memory import give_back_memory
from influence.own_training import OwnTraining, digest_of_file, own_training
from influence.progress import Progress
from influence.records import (
    EpochCheckpoint,
    OwnTrainingRecord,
    OwnTrainingUse,
    StageRecord,
    to_json,
)
from influence.replica import choose_device
from influence.run_log import RunLog
from influence.tokenization import Encoded
from influence.training_progress import TrainingProgress, Watcher
from influence.training_record import TrainingRecord, read_record, remove_training, versions

Train = Callable[[FinetuneJob, Config, Watcher], TrainingRecord]

_LOOK_EVERY_SECONDS = 2.0


def make_training(
    config: Config, progress: Progress, log: RunLog, train: Train
) -> tuple[Config, OwnTraining | None]:
    """The config with the result of the training it asks for, which is made where it is not there.

    A config that asks for none comes back as it is. What was trained of it goes on from its newest
    checkpoint; another run that is at it is waited for.

    Raises:
        InputError: settings, files or a model that cannot be trained on.
        WorkersLostError: of `train`; what is committed stands.
    """
    with log.telling_the_end():
        own = own_training(config)
        if own is None:
            return config, None
        stage = _begin(log, own)
        start = time.monotonic()
        record = own.read() or _train_alone(own, progress, log, train)
        log.took(own.stage, time.monotonic() - start, stage.replica_seconds)
        # Another run may have made it while this one waited.
        reused = not stage.computed
        stage.reused = int(reused)
        use = OwnTrainingUse(url=own.url, reused=reused, record=record)
        setattr(log.manifest, own.stage, use)
        log.save()
    if reused:
        progress.note(f"{own.stage}: made before, {own.url}")
    return own.applied(config), own


def train_here(job: FinetuneJob, config: Config, watcher: Watcher) -> TrainingRecord:
    """Train in this process.

    Raises:
        InputError: several workers are asked for.
    """
    if config.finetune.workers > 1:
        raise InputError(
            f"finetune.workers: {config.finetune.workers} workers need Ray; leave --in-process "
            "out, or set it to 1"
        )
    device = choose_device(config.model.device, config.replicas.num_gpus)
    try:
        return train(job, device, watcher)
    finally:
        give_back_memory()


def _begin(log: RunLog, own: OwnTraining) -> StageRecord:
    found = own.fingerprint
    stage = StageRecord(fingerprint=found.hex, values=found.values, planned=[own.key])
    stage.shards = 1
    log.manifest.stages[own.stage] = stage
    log.doing(own.stage)
    log.save()
    return stage


def _train_alone(
    own: OwnTraining, progress: Progress, log: RunLog, train: Train
) -> OwnTrainingRecord:
    """Train, as the only one that does; or take what another run makes in the meantime."""
    told = False
    while True:
        with ExitStack() as stack:
            try:
                lease = stack.enter_context(driving(own.url, progress.note))
            except RunBusyError as busy:
                if not told:
                    progress.note(f"{own.stage}: waiting for another run that makes it: {busy}")
                told = True
            else:
                made = own.read()
                return made or _train(own, progress, log, lease, train)
        log.sign_of_life()
        time.sleep(_LOOK_EVERY_SECONDS)
        made = own.read()
        if made is not None:
            return made


def _train(
    own: OwnTraining, progress: Progress, log: RunLog, lease: Lease, train: Train
) -> OwnTrainingRecord:
    config, stage = own.training, log.manifest.stages[own.stage]
    progress.note(f"{own.stage}: fine-tuning on the pool, into {own.url}")
    shown = TrainingProgress(quiet=progress.console.quiet, console=progress.console)
    watcher = _Recorded(shown, log, own, lease)
    try:
        job = prepare_finetune(config, watcher, own.files)
        stage.rows = len(job.rows.encoded)
        _clear_damaged(own, progress)
        found = claim(job, watcher, replace=True) or train(job, config, watcher)
    except InputError as error:
        raise type(error)(own.kind.own_keys(str(error))) from None
    finally:
        shown.end()
    stage.devices, stage.computed = [found.device], 1
    part = stage.tokens / max(1, found.tokens)  # of a training that went on, what this run did
    stage.load = load_of_rows(job.rows.encoded).times(job.settings.epochs * part)
    log.computed[own.stage] = {own.key}
    return _publish(own, found)


def _clear_damaged(own: OwnTraining, progress: Progress) -> None:
    """A result that is not whole is removed; one that only lacks its marker is as good as new."""
    urls = [storage.join(own.url, name) for name in (own.kind.marker, *own.result_files)]
    marked, *files = [storage.head(url) is not None for url in urls]
    done = read_record(own.url)
    if not marked and (done is None or not done.done or all(files)):
        return
    progress.note(f"{own.stage}: damaged, made again: {own.url}")
    storage.delete(urls[0])
    remove_training(own.url)


def load_of_rows(rows: Sequence[Encoded]) -> Load:
    """What one pass over the rows takes."""
    return Load(
        len(rows),
        sum(row.n_tokens for row in rows),
        sum(row.n_response_tokens for row in rows),
        sum(row.n_tokens**2 for row in rows),
    )


def _publish(own: OwnTraining, found: TrainingRecord) -> OwnTrainingRecord:
    files = {
        name: digest_of_file(storage.read_bytes(storage.join(own.url, name)))
        for name in own.result_files
    }
    record = OwnTrainingRecord(
        fingerprint=own.fingerprint.hex,
        values=own.fingerprint.values,
        rows=found.rows.trained,
        left_out=found.rows.left_out,
        steps=found.total_steps,
        tokens=found.tokens,
        seconds=found.seconds,
        workers=found.workers,
        device=found.device,
        epoch_losses=epoch_losses(found),
        checkpoints=_kept(own, found),
        versions=versions(),
        files=files,
    )
    storage.put(storage.join(own.url, own.kind.marker), to_json(record))
    return record


def _kept(own: OwnTraining, found: TrainingRecord) -> list[EpochCheckpoint]:
    """What is left of each epoch, with the mean of its steps' learning rates."""
    settings = settings_of(own.training)
    steps = Steps(found.rows.trained, settings.batch_size, settings.epochs, settings.seed)
    schedule = (settings.warmup_ratio, settings.schedule)
    rates = epoch_rates(steps, settings.learning_rate, *schedule)
    return [
        EpochCheckpoint(folder=epoch_folder(k + 1), step=steps.ends[k], learning_rate=rates[k])
        for k in range(own.epochs)
    ]


def epoch_losses(record: TrainingRecord) -> list[float]:
    """Mean loss of each epoch's steps; of the last one as far as it goes."""
    by_epoch: dict[int, list[float]] = {}
    for step in record.steps:
        by_epoch.setdefault((step.step - 1) // record.epoch_steps, []).append(step.loss)
    return [sum(losses) / len(losses) for losses in by_epoch.values()]


class _Recorded:
    """A watcher that also keeps the run's record up to date."""

    def __init__(self, shown: Watcher, log: RunLog, own: OwnTraining, lease: Lease) -> None:
        self._shown, self._log, self._lease, self._name = shown, log, lease, own.stage
        self._stage = log.manifest.stages[own.stage]
        self._workers, self._total = own.training.finetune.workers, 0
        self._since = time.monotonic()

    def begin(self, done: int, total: int, per_epoch: int) -> None:
        self._total = total
        self._shown.begin(done, total, per_epoch)
        self._stage.set_up_seconds += (time.monotonic() - self._since) * self._workers
        self._tell(done)

    def step(self, done: int, loss: float, tokens: int, seconds: float) -> None:
        self._shown.step(done, loss, tokens, seconds)
        self._stage.tokens += tokens
        self._stage.model_seconds += seconds * self._workers
        self._tell(done)

    def evaluating(self, name: str, done: int, total: int) -> None:
        self._shown.evaluating(name, done, total)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def end(self) -> None:
        self._shown.end()

    def _tell(self, done: int) -> None:
        # Whoever has taken over goes on from what is committed.
        self._lease.check()
        now = time.monotonic()
        self._stage.replica_seconds += (now - self._since) * self._workers
        self._since = now
        self._log.doing(f"{self._name}: step {done:,} of {self._total:,}")
        self._log.save_sometimes()
