"""A config as what it stands for: contents in place of paths, for digests of what a run decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from influence.candidates import SourceFile
from influence.config import Config
from influence.fingerprints import Fingerprint, optimizer_values


def content_values(
    config: Config,
    prints: Mapping[str, Fingerprint],
    files: Sequence[SourceFile],
    target_files: Mapping[str, Sequence[SourceFile]],
    *,
    without: Set[str],
) -> dict[str, Any]:
    """A config's values with the contents of everything that it names, JSON-able.

    Model, adapters, optimiser's state, sentence encoder and the texts that no candidate should be
    like count by the stages' fingerprints; where they lie does not count.

    prints: the stages' fingerprints; without: sections that decide nothing of what is asked.
    """
    values = config.model_dump(mode="json", exclude={*without, "model"})
    values["data"]["candidates"] = _contents(files)
    for name, own in target_files.items():
        values["targets"][name]["path"] = _contents(own)
    stages = {name: each.hex for name, each in prints.items()}
    contamination = values.pop("contamination", None)
    if contamination is None or contamination["action"] != "drop":
        stages.pop("contamination", None)  # like rows are told of, and selected as any other
    for section, key in (("reference", "adapter"), ("semantic", "encoder")):
        if section in values:
            values[section][key] = None
    # Not in every fingerprint of a stage: those of inner products are made when they are computed.
    if config.optimizer.state is not None:
        values["optimizer"]["state"] = optimizer_values(config)["optimizer_state"]
    values["stages"] = stages
    return values


def _contents(files: Sequence[SourceFile]) -> list[list[Any]]:
    return [[file.content_hash, file.rows] for file in files]
