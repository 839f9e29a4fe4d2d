"""An optimizer's saved state: found, read without a pickle, its entries matched with parameters.

What the states of all optimisers have in common; `influence.optimizer_state` knows Adam's and
`influence.sgd_state` that of SGD.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from influence import storage
from influence.errors import InputError
from influence.gradients.layers import Layer
from influence.gradients.parameters import is_adapter
from influence.optimizer_order import KEY, Entry, names_by_name, names_by_order

OPTIMIZER_FILE = "optimizer.pt"


@dataclass(frozen=True)
class SavedOptimizer:
    """A state dict of a torch optimizer; groups without parameters are left out."""

    file: str
    groups: list[dict[str, Any]]
    entries: list[list[Entry]]

    @property
    def flat(self) -> list[Entry]:
        """The entries of all groups, in their order."""
        return list(chain(*self.entries))


def local_state(path: str) -> str:
    """The optimizer file of a checkpoint folder, or the file itself; one of a URL (s3://...) is
    downloaded to a temporary file, once for each version of it.

    Raises InputError where there is none.
    """
    if "://" not in path:
        return _optimizer_file(path)
    for url in (path, storage.join(path, OPTIMIZER_FILE)):
        found = storage.head(url)
        if found is not None:
            return _downloaded(url, f"{found.etag} {found.size}")
    raise InputError(
        f"{KEY}: {path}: neither an object nor a folder with {OPTIMIZER_FILE} in it; give a "
        "checkpoint of the Trainer, the output of `influence finetune`, or the file itself"
    )


def read_optimizer(path: str) -> SavedOptimizer:
    """The state dict in a checkpoint folder or file (see `local_state`).

    Raises InputError for a file that is missing, cut off, or holds more than tensors and plain
    values.
    """
    file = local_state(path)
    saved = _read(file)
    groups = [group for group in saved["param_groups"] if group["params"]]
    # A buffer that has not begun is saved as None.
    entries = [
        [Entry(key, _there(saved["state"].get(key)), group) for key in group["params"]]
        for group in groups
    ]
    return SavedOptimizer(file, groups, entries)


def parameter_names(saved: SavedOptimizer, model: nn.Module) -> list[str]:
    """The full name in the model of every entry, in the order of `saved.flat`.

    By name if the file has names, otherwise by the Trainer's order, every shape being checked: as
    trained are tried all parameters, all but the embeddings, those that require gradients, and of a
    PEFT model what its adapter's config trains.

    Raises InputError if the state is of another model, or could be assigned in several ways.
    """
    names = _saved_names(saved.groups)
    if names is None:
        return names_by_order(saved.file, model, saved.entries)
    return names_by_name(saved.file, model, names, saved.flat)


def check_plain(saved: SavedOptimizer) -> None:
    """Raise InputError for moments that are not plain floating-point tensors."""
    for each in saved.flat:
        tensors = [value for key, value in each.moments.items() if key != "step"]
        if any(type(x) is not Tensor or not x.is_floating_point() for x in tensors):
            raise InputError(
                f"{KEY}: the moments of parameter {each.key} in {saved.file} are not plain "
                "floating-point tensors; quantised or distributed states are not supported"
            )


def check_trained(layers: Sequence[Layer], known: Collection[str]) -> None:
    """Raise InputError naming the layers that are not among the parameters of a state."""
    missing = [layer.name for layer in layers if layer.name not in known]
    if missing:
        lora = any(map(is_adapter, known))
        advice = "lora" if lora else "patterns of the trained ones"
        raise InputError(
            f"{KEY}: no moments for {len(missing)} of {len(layers)} attributed parameters "
            f"({some(missing)}): they were frozen or never stepped; set gradients.parameters to "
            f"{advice}"
        )


def common(saved: SavedOptimizer, key: str, otherwise: str = "") -> Any:
    """The value that all groups share; raises InputError if they do not."""
    values = [group.get(key, group.get(otherwise)) for group in saved.groups]
    if any(value != values[0] for value in values):
        raise InputError(
            f"{KEY}: expected one {key} for all parameters, but the groups in {saved.file} have "
            f"{values}; only a step with the same one everywhere is known, so train with one"
        )
    return values[0]


def some(names: Sequence[str]) -> str:
    """The first few names, for an error."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _there(moments: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (moments or {}).items() if value is not None}


@lru_cache(maxsize=4)
def _downloaded(url: str, _version: str) -> str:
    folder = tempfile.mkdtemp(prefix="optimizer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = os.path.join(folder, OPTIMIZER_FILE)
    with open(file, "wb") as into:
        into.write(storage.read_bytes(url))
    return file


def _optimizer_file(path: str) -> str:
    file = os.path.join(path, OPTIMIZER_FILE) if os.path.isdir(path) else path
    if os.path.isfile(file):
        return file
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    raise InputError(
        f"{KEY}: {file} does not exist (in its folder: {some(there) or 'nothing'}); give a "
        f"checkpoint folder of the Trainer with {OPTIMIZER_FILE} in it, or the file itself. States "
        "that FSDP or DeepSpeed wrote in pieces must be gathered into one file first"
    )


def _read(file: str) -> dict[str, Any]:
    advice = "save the optimizer's state again with torch.save(optimizer.state_dict(), FILE)"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{KEY}: {file} holds more than tensors and plain values, or is no file of torch.save; "
            f"pickled objects are never loaded: {advice} ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{KEY}: {file} cannot be read, it may be cut off: {str(error).splitlines()[0]}; "
            f"{advice}"
        ) from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        keys = some([str(key) for key in saved]) if isinstance(saved, dict) else type(saved)
        raise InputError(
            f"{KEY}: {file} is no optimizer's state: expected the keys state and param_groups, "
            f"found {keys}; give the {OPTIMIZER_FILE} of a checkpoint"
        )
    return saved


def _saved_names(groups: Sequence[dict[str, Any]]) -> list[str] | None:
    """The names in the state dict, if all parameters have one."""
    names: list[str] = []
    for group in groups:
        own = group.get("param_names", group["params"])
        if len(own) != len(group["params"]) or not all(isinstance(name, str) for name in own):
            return None
        names += own
    return names
