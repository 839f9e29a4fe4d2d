"""In2Core's reference model: which adapter the gradients are taken with.

It is named (`reference.adapter`, `model.adapter`), or the job makes it (`reference.finetune`): LoRA
fine-tuning on the pool, kept in the cache at `reference/FINGERPRINT` for every run that asks for
the same. `reference.json` there is put last, and makes it count.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from influence import storage
from influence.candidates import SourceFile, scan_files
from influence.checkpoints import ADAPTER_FILES
from influence.config import Config
from influence.config_finetune import POOL
from influence.errors import InputError
from influence.finetune_job import identity_of, settings_of
from influence.fingerprints import Fingerprint, fingerprint
from influence.records import ReferenceRecord
from influence.replica import load_tokenizer
from influence.schemas import FORMAT_VERSION
from influence.tokenization import template_fingerprint

STAGE = "reference"
MARKER = "reference.json"
#: Of the settings that a training has to keep: evaluating changes nothing that is trained.
_OF_EVALUATION = "evaluate_every"


@dataclass(frozen=True)
class Reference:
    """A reference model that the job makes.

    Attributes:
        fingerprint: of everything that changes the result: rows, model, settings, seed.
        url: the folder in the cache.
        training: the config as `influence finetune` takes it.
        files: of the pool.
        there: whether it was made before.
    """

    fingerprint: Fingerprint
    url: str
    training: Config
    files: list[SourceFile] = field(repr=False)
    there: bool = False

    @property
    def key(self) -> str:
        """The cache key of what is put last."""
        return f"{STAGE}/{self.fingerprint.hex}/{MARKER}"

    def read(self) -> ReferenceRecord | None:
        """What was made; None if it is not there, or not whole."""
        marker = storage.load(storage.join(self.url, MARKER))
        try:
            record = None if marker is None else ReferenceRecord.model_validate_json(marker[0])
        except ValidationError:
            return None
        if record is None:
            return None
        for name in ADAPTER_FILES:
            found = storage.load(storage.join(self.url, name))
            if found is None or digest_of_file(found[0]) != record.files.get(name):
                return None
        return record


def digest_of_file(data: bytes) -> str:
    """32 hex digits of a file's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def with_reference(config: Config) -> Config:
    """The config with the adapter that it names for its reference model as `model.adapter`.

    One whose reference the job makes is left as it is; see `own_reference`. Called once per job,
    before its model is looked at.

    Raises:
        InputError: see `reference_adapter`.
    """
    named = config.reference.adapter or config.model.adapter
    if config.method != "in2core" or config.reference.finetune is not None:
        return config
    if named is None and config.gradients.parameters != "lora":
        return config  # gradients of the model's own weights: it is the reference
    model = config.model.model_copy(update={"adapter": reference_adapter(config)})
    return config.model_copy(update={"model": model})


def with_adapter(config: Config, adapter: str) -> Config:
    """The config with this adapter in the model."""
    model = config.model.model_copy(update={"adapter": adapter, "adapter_revision": None})
    return config.model_copy(update={"model": model})


def reference_adapter(config: Config) -> str:
    """The folder, URL or hub name of the reference model's LoRA adapter.

    Raises:
        InputError: the config names none.
    """
    adapter = config.reference.adapter or config.model.adapter
    if adapter is None:
        raise InputError(
            "reference.adapter: method: in2core takes the gradients of LoRA factors that were "
            "fine-tuned on the pool; name the folder of such an adapter (PEFT) in "
            "reference.adapter or model.adapter, or let the job make it: reference.finetune: {}"
        )
    return adapter


def own_reference(config: Config) -> Reference | None:
    """The reference that the job makes, found by what changes its result; None if none is asked
    for. Reads the pool's files for their contents.

    Raises:
        InputError: files or a model that are not there.
    """
    section = config.reference.finetune
    if config.method != "in2core" or section is None:
        return None
    files = _pool(config)
    own = {"data": [POOL], "evaluate": {}}
    training = config.model_copy(update={"finetune": section.model_copy(update=own)})
    try:
        found = reference_fingerprint(training, files)
    except InputError as error:
        raise type(error)(own_keys(str(error))) from None
    url = storage.join(storage.absolute(config.cache_url), STAGE, found.hex)
    output = {"output": url}
    training = training.model_copy(update={"finetune": training.finetune.model_copy(update=output)})
    reference = Reference(found, url, training, files)
    return replace(reference, there=reference.read() is not None)


def reference_fingerprint(training: Config, files: list[SourceFile]) -> Fingerprint:
    """Of the rows' contents, the model, what is in force of the settings, and the seed."""
    settings = settings_of(training).that_count()
    del settings[_OF_EVALUATION]
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


def made_reference(config: Config) -> Config:
    """The config with the reference's adapter, for what needs its gradients.

    Raises:
        InputError: the job has to make it first.
    """
    reference = own_reference(config)
    if reference is None:
        return config
    if not reference.there:
        raise InputError(
            "reference.finetune: the reference model is not in the cache yet; `influence select` "
            "makes it"
        )
    return with_adapter(config, reference.url)


@contextmanager
def planned_reference(config: Config) -> Iterator[tuple[Config, Reference | None]]:
    """The config with the reference's adapter or, as long as it is not made, with one of its shape
    and random numbers in its place: for what looks ahead."""
    reference = own_reference(config)
    if reference is None or reference.there:
        yield (config if reference is None else with_adapter(config, reference.url)), reference
        return
    from influence.blank_adapter import write_blank

    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        write_blank(reference.training, folder)
        yield with_adapter(config, folder), reference


def _pool(config: Config) -> list[SourceFile]:
    try:
        return scan_files(config.data.candidates, config.data.limit)
    except InputError as error:
        raise InputError(f"data.candidates: {error}") from None


def own_keys(text: str) -> str:
    """An error of the fine-tuning with the keys of this section."""
    return f"reference.{text}" if text.startswith("finetune.") else text
