"""A training of the job's own: LoRA fine-tuning on the pool, whose adapter later stages use.

In2Core's reference model and the warm-up are such trainings; what tells them apart is a
`TrainingKind`. A result lies in the cache at `STAGE/FINGERPRINT` for every run that asks for the
same; `STAGE.json` there is put last, and makes it count.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from influence import storage
from influence.candidates import SourceFile, scan_files
from influence.checkpoints import OPTIMIZER_FILE, epoch_files, epoch_folder
from influence.config import Config
from influence.config_finetune import POOL, FinetuneConfig, WarmupConfig
from influence.errors import InputError
from influence.finetune_job import identity_of, settings_of
from influence.fingerprints import Fingerprint, fingerprint
from influence.records import OwnTrainingRecord
from influence.reference import REFERENCE
from influence.replica import load_tokenizer
from influence.schemas import FORMAT_VERSION
from influence.tokenization import template_fingerprint
from influence.training_kind import TrainingKind
from influence.warmup import WARMUP

KINDS = (REFERENCE, WARMUP)
"""A config asks for one of them at most: each is of other methods."""
STAGES = tuple(kind.stage for kind in KINDS)
#: Of the settings that a training has to keep: evaluating changes nothing that is trained.
_OF_EVALUATION = "evaluate_every"


@dataclass(frozen=True)
class OwnTraining:
    """A training that the job makes.

    Attributes:
        kind: what for.
        fingerprint: of everything that changes the result: rows, model, settings, seed.
        url: the folder in the cache.
        training: the config as `influence finetune` takes it.
        files: of the pool.
        there: whether it was made before.
    """

    kind: TrainingKind
    fingerprint: Fingerprint
    url: str
    training: Config
    files: list[SourceFile] = field(repr=False)
    there: bool = False

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.kind.stage

    @property
    def epochs(self) -> int:
        """Checkpoints that are kept, one for each epoch that was begun; 0: none but the result."""
        return epochs_kept(self.training.finetune)

    @property
    def result_files(self) -> list[str]:
        """The names of what later stages read, apart from the marker."""
        return [*self.kind.files, *epoch_files(self.epochs)]

    @property
    def key(self) -> str:
        """The cache key of what is put last."""
        return f"{self.stage}/{self.fingerprint.hex}/{self.kind.marker}"

    def applied(self, config: Config) -> Config:
        """The config with the result."""
        return self.kind.apply(config, self.url)

    def read(self) -> OwnTrainingRecord | None:
        """What was made; None if it is not there, or not whole."""
        marker = storage.load(storage.join(self.url, self.kind.marker))
        try:
            record = None if marker is None else OwnTrainingRecord.model_validate_json(marker[0])
        except ValidationError:
            return None
        if record is None:
            return None
        for name in self.result_files:
            found = storage.load(storage.join(self.url, name))
            if found is None or digest_of_file(found[0]) != record.files.get(name):
                return None
        return record


def digest_of_file(data: bytes) -> str:
    """32 hex digits of a file's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def epochs_kept(section: FinetuneConfig) -> int:
    """The checkpoints beside the result that such a training leaves."""
    if not isinstance(section, WarmupConfig) or not section.keep_epochs:
        return 0
    return math.ceil(section.epochs - 1e-9)  # as the steps are counted


def own_training(config: Config) -> OwnTraining | None:
    """The training that the job makes, found by what changes its result; None if none is asked
    for. Reads the pool's files for their contents.

    Raises:
        InputError: files or a model that are not there.
    """
    for kind in KINDS:
        section = kind.section(config)
        if section is not None:
            break
    else:
        return None
    files = _pool(config)
    own = {"data": [POOL], "evaluate": {}}
    training = config.model_copy(update={"finetune": section.model_copy(update=own)})
    try:
        found = training_fingerprint(training, files)
    except InputError as error:
        raise type(error)(kind.own_keys(str(error))) from None
    url = storage.join(storage.absolute(config.cache_url), kind.stage, found.hex)
    output = {"output": url}
    training = training.model_copy(update={"finetune": training.finetune.model_copy(update=output)})
    asked = OwnTraining(kind, found, url, training, files)
    return replace(asked, there=asked.read() is not None)


def training_fingerprint(training: Config, files: list[SourceFile]) -> Fingerprint:
    """Of the rows' contents, the model, what is in force of the settings, and the seed.

    A training that keeps its epochs is another one, though its result is the same: what reads the
    result alone need not wait for the rest, nor be made again for it.
    """
    settings = settings_of(training).that_count()
    del settings[_OF_EVALUATION]
    if epochs_kept(training.finetune):
        settings["keep_epochs"] = True
    pool = [[file.content_hash, file.rows] for file in files]
    return fingerprint(
        {
            "format_version": FORMAT_VERSION,
            "template": template_fingerprint(load_tokenizer(training.model)),
            "pool": fingerprint({"files": pool}).hex,
            "fraction": training.finetune.fraction,
            "weights": training.finetune.weights,
            **identity_of(training),
            **settings,
        }
    )


def with_made_training(config: Config) -> Config:
    """The config with the result of the training it asks for, for what needs its gradients.

    Raises:
        InputError: the job has to make it first.
    """
    own = own_training(config)
    if own is None:
        return config
    if not own.there:
        raise InputError(
            f"{own.kind.key}: {own.kind.what} is not in the cache yet; `influence select` makes it"
        )
    return own.applied(config)


@contextmanager
def planned_training(config: Config) -> Iterator[tuple[Config, OwnTraining | None]]:
    """The config with the training's result or, as long as it is not made, with one of its shape
    and random numbers in its place: for what looks ahead."""
    own = own_training(config)
    if own is None or own.there:
        yield (config if own is None else own.applied(config)), own
        return
    from influence.blank_adapter import write_blank

    with tempfile.TemporaryDirectory(prefix=f"{own.stage}-") as folder:
        try:
            whole = OPTIMIZER_FILE in own.kind.files
            write_blank(own.training, folder, optimizer=whole)
            for k in range(1, own.epochs + 1):
                into = os.path.join(folder, epoch_folder(k))
                write_blank(own.training, into, optimizer=whole, seed=k)
        except InputError as error:
            raise type(error)(own.kind.own_keys(str(error))) from error
        yield own.kind.apply(config, folder), own


def _pool(config: Config) -> list[SourceFile]:
    try:
        return scan_files(config.data.candidates, config.data.limit)
    except InputError as error:
        raise InputError(f"data.candidates: {error}") from None
