"""Checkpoints of a training in a folder or an object store: committed whole, or not there.

OUTPUT/checkpoints/STEP holds the files and, put last, `complete.json` with their sizes and
digests. What was interrupted while it was written has no such file, or one that does not fit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from influence import storage
from influence.errors import InputError

MARKER = "complete.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
OPTIMIZER_FILE = "optimizer.pt"
#: What is kept of a checkpoint of transformers' Trainer. Not its pickled arguments; nor the states
#: of random generators, which are seeded anew at every step.
FILES = (*ADAPTER_FILES, OPTIMIZER_FILE, "scheduler.pt", "trainer_state.json")
#: What later stages read of a state of the training.
RESULT_FILES = (*ADAPTER_FILES, OPTIMIZER_FILE)
_EPOCH = re.compile(r"checkpoint-\d+")
#: While a training goes on, so many stay at least: the newest might be damaged.
AT_LEAST = 2


class Checkpoints:
    """The checkpoints below one output directory (a path or URL)."""

    def __init__(self, output: str) -> None:
        self.url = storage.join(output, "checkpoints")

    def commit(self, step: int, folder: str) -> None:
        """Put the files of a local folder, and then the marker that makes them count."""
        base = storage.join(self.url, f"{step:08d}")
        listing = {}
        for name in FILES:
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            storage.put(storage.join(base, name), data)
            listing[name] = {"bytes": len(data), "blake2b": _digest(data)}
        storage.put(storage.join(base, MARKER), json.dumps(listing, indent=1).encode())

    def steps(self) -> list[int]:
        """The steps that have a marker, increasing."""
        found = []
        for info in storage.list_objects(self.url):
            *_, step, name = info.url.rsplit("/", 2)
            if name == MARKER and step.isdigit():
                found.append(int(step))
        return sorted(found)

    def fetch_newest(self, folder: str) -> tuple[int, str] | None:
        """(step, local folder) of the newest one that is whole, copied below `folder`, or None."""
        for step in reversed(self.steps()):
            data = self._read(step)
            if data is None:
                continue
            into = os.path.join(folder, f"checkpoint-{step}")
            os.makedirs(into, exist_ok=True)
            for name, content in data.items():
                with open(os.path.join(into, name), "wb") as file:
                    file.write(content)
            return step, into
        return None

    def prune(self, keep: int | None) -> None:
        """Remove all but the newest `keep` (None: nothing) and what is left of unfinished ones."""
        if keep is None:
            return
        kept = self.steps()[-keep:] if keep else []
        for name in (MARKER, *FILES):  # markers first: what is half removed does not count
            for info in storage.list_objects(self.url):
                *_, step, found = info.url.rsplit("/", 2)
                if found == name and step.isdigit() and int(step) not in kept:
                    storage.delete(info.url)

    def _read(self, step: int) -> dict[str, bytes] | None:
        """The files of one checkpoint, or None if they are not what its marker says."""
        base = storage.join(self.url, f"{step:08d}")
        try:
            listing: dict[str, Any] = json.loads(storage.read_bytes(storage.join(base, MARKER)))
            data = {name: storage.read_bytes(storage.join(base, name)) for name in FILES}
        except (InputError, ValueError):
            return None
        whole = all(listing.get(n, {}).get("blake2b") == _digest(b) for n, b in data.items())
        return data if whole else None


def epoch_folder(number: int) -> str:
    """The folder in a training's output for what there is after an epoch, counted from 1."""
    return f"checkpoint-{number}"


def epoch_files(epochs: int) -> list[str]:
    """The names in a training's output of all files of such folders."""
    return [f"{epoch_folder(k + 1)}/{name}" for k in range(epochs) for name in RESULT_FILES]


def remove_epochs(output: str) -> None:
    """Remove what was left after each epoch."""
    for info in storage.list_objects(output):
        *_, folder, name = info.url.rsplit("/", 2)
        if _EPOCH.fullmatch(folder) and name in RESULT_FILES:
            storage.delete(info.url)


def publish(folder: str, output: str) -> None:
    """Put the adapter and the optimiser's state of a local checkpoint into OUTPUT."""
    for name in RESULT_FILES:
        with open(os.path.join(folder, name), "rb") as file:
            storage.put(storage.join(output, name), file.read())


def fetch_adapter(output: str, folder: str) -> str:
    """Copy the adapter (and the optimiser's state) of a finished training to a local folder.

    Returns the folder, for `model.adapter` and `optimizer.state`.

    Raises:
        InputError: there is no finished training.
    """
    copy(output, folder, RESULT_FILES)
    return folder


def copy(url: str, folder: str, names: Sequence[str]) -> None:
    """Copy these files of a folder (or s3://...) into a local folder."""
    os.makedirs(folder, exist_ok=True)
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(storage.read_bytes(storage.join(url, name)))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
