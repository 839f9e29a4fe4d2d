"""Resuming a run: the same config goes on; a changed one is refused, printing both values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from influence import storage
from influence.config import Config
from influence.config_loading import dump_config, parse_config
from influence.errors import InputError
from influence.finetune_settings import FREE
from influence.outputs import remove_results
from influence.replica import resolve_dtype

# What changes no number of a selection: where things are, how many replicas, how work is cut and
# retried; fine-tuning and evaluations come after it, and guard their own results.
_FREE = (
    "run",
    "cache",
    "prices",
    "replicas",
    "finetune",
    "evaluation",
    "coverage",
    "transfer",
)
# Of an evaluation's own run, which is told by its section what it is.
EVALUATION_FREE = tuple(section for section in _FREE if section != "evaluation")
# Of `reference.finetune` and `warmup`: how the same result is come by.
_FREE_OF_TRAINING = ("workers", *FREE)
# Sections whose change makes a stage of the cache useless. Targets, budget and method are not here:
# they reuse every shard that the cache holds.
_RECOMPUTES = {
    "model": "everything but the catalogue",
    "data.max_length": "everything",
    "data.loss_on": "everything",
    "embedding": "the embeddings",
    "semantic.encoder": "the sentence embeddings",
    "landmarks.count": "the gradients of new landmarks",
    "landmarks.choose": "the gradients of new landmarks",
    "landmarks.initial": "the gradients of new landmarks",
    "landmarks.recall": "the gradients of further rounds",
    "landmarks.audit": "the gradients of other audited rows",
    "contamination.ngram": "the comparison with the targets' texts",
    "contamination.overlap": "the comparison with the targets' texts",
    "contamination.jaccard": "the comparison with the targets' texts",
    "contamination.against": "the comparison with the targets' texts",
    "gradients.parameters": "the gradients",
    "gradients.blocks": "the gradients",
    "gradients.projection": "the gradients",
    "gradients.normalize": "the inner products, with projection: exact",
    "gradients.norms": "the gradients",
    "gradients.side": "the gradients",
    "gradients.dim": "the gradients",
    "gradients.layer_dim": "the gradients",
    "gradients.layer_sketch": "the gradients",
    "reference.finetune": "the reference model, and all gradients",
    "reference.adapter": "the gradients",
    "warmup": "the warm-up, and all embeddings and gradients",
    "layers": "the gradients",
    "layer_economy": "the pilot's gradients, and those of other layers",
    "gradients.reduction": "the gradients",
    "weights.curvature": "the directions (with an optimiser's state the gradients)",
    "weights.directions": "the directions and the Hessian's products with them",
    "optimizer": "the gradients (without gradients.normalize those of the targets alone)",
    "seed": "landmarks, embeddings and gradients",
}


def claim_run(config: Config, *, replace: bool = False, free: Sequence[str] = _FREE) -> None:
    """Take a run directory for this config, writing `config.yaml` into it.

    `free` are the sections that may have changed since an earlier attempt.

    With `replace`, the results of another config are removed first, so that none of them stands
    beside this one's; those of the same config stay until new ones take their place.

    Raises:
        InputError: the directory belongs to a run with another config, and not `replace`.
    """
    url = storage.join(config.run, "config.yaml")
    # Without a manifest no stage has begun: an earlier attempt ended on its config or its data.
    begun = storage.head(storage.join(config.run, "manifest.json")) is not None
    if begun and storage.head(url) is not None:
        changes = _changes(url, config, replace, free)
        if changes and not replace:
            raise InputError(_explain(config.run, changes))
        if changes:
            remove_results(config.run)
    storage.put(url, dump_config(config).encode())


def _changes(
    url: str, config: Config, replace: bool, free: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    try:
        before = _earlier_config(url)
    except InputError:
        if not replace:
            raise
        before = {"(whole file)": "not readable"}
    now = yaml.safe_load(dump_config(config))
    return changed_values(_with_dtype(before), _with_dtype(now), free)


def _with_dtype(values: dict[str, Any]) -> dict[str, Any]:
    """`dtype: auto` as what it means with these replicas, whose number and size are free."""
    if not {"model", "replicas"} <= values.keys():
        return values  # no config of this version: it differs anyway
    model, gpus = values["model"], values["replicas"]["num_gpus"]
    dtype = resolve_dtype(model["dtype"], gpus, model["device"])
    return {**values, "model": {**model, "dtype": dtype}}


def _earlier_config(url: str) -> dict[str, Any]:
    try:
        before = yaml.safe_load(storage.read_bytes(url))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{url}: not valid YAML ({error}); pass --replace to put this run in its place"
        ) from None
    try:
        # With this version's defaults: the file may be an input config, or an earlier version's.
        return yaml.safe_load(dump_config(parse_config(before, name=url)))
    except InputError:
        # It names a value that this version does not know: compared as it stands, and shown.
        return before if isinstance(before, dict) else {"(whole file)": before}


def changed_values(
    before: dict[str, Any], now: dict[str, Any], free: Sequence[str] = _FREE
) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of every value that differs and that changes a result."""
    old, new = _flatten(before), _flatten(now)
    keys = sorted(old.keys() | new.keys())
    return [
        (key, old.get(key), new.get(key))
        for key in keys
        if not _is_free(key, free) and old.get(key) != new.get(key)
    ]


def _is_free(key: str, free: Sequence[str]) -> bool:
    section, *rest = key.split(".")
    setting = rest[-1] in _FREE_OF_TRAINING if rest else False
    own = (section, len(rest)) in (("reference", 2), ("warmup", 1)) and setting
    return section in free or own


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _explain(run: str, changes: list[tuple[str, Any, Any]]) -> str:
    lines = [f"{run} holds a run with another config:"]
    lines += [f"  {key}: was {old!r}, now {new!r}" for key, old, new in changes]
    again = sorted(
        {
            what
            for key, _, _ in changes
            for section, what in _RECOMPUTES.items()
            if key == section or key.startswith(section + ".")
        }
    )
    lines.append(
        "would be computed again: "
        + ("; ".join(again) if again else "nothing that the cache holds")
    )
    lines.append(
        "Use another `run` (with the same `cache`, everything that still fits is reused), "
        "or pass --replace to put the new results in this directory."
    )
    return "\n".join(lines)
