"""Stages of a method's own: numbers for every row, computed by the replicas and kept as shards.

Adding one needs no change in the worker: a method names it (`Method.stages`), and the replicas,
fingerprints, the plan and the cache's listing find it there. See docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from influence.batching import Batch, make_batches
from influence.candidates import Example
from influence.config import Config
from influence.load import Load
from influence.methods import METHODS
from influence.schemas import VectorLayout
from influence.tokenization import Encoded
from influence.unit_tables import unique_rows

if TYPE_CHECKING:  # both are made of what asks for stages
    from influence.model_shape import ModelShape
    from influence.stages import Toolbox, Vectors


@dataclass(frozen=True)
class Rows:
    """The different rows of a unit, each once.

    Attributes:
        encoded: their tokens; rows that cannot be scored (with a `reason`) are among them.
        examples: their messages, in the same order; empty where speeds are measured, of a stage
            that does not say that it `reads_texts`.
        token_budget: tokens of a batch, padding included.
    """

    encoded: Sequence[Encoded]
    examples: Sequence[Example]
    token_budget: int

    @cached_property
    def batches(self) -> list[Batch]:
        """The rows that can be scored, padded together; `positions` index `encoded`."""
        return make_batches(self.encoded, self.token_budget)

    @property
    def scorable(self) -> list[int]:
        """Positions of the rows that can be scored."""
        return [i for i, row in enumerate(self.encoded) if row.reason is None]


def different_rows(
    examples: Sequence[Example], encoded: Sequence[Encoded], token_budget: int
) -> tuple[np.ndarray, Rows]:
    """(for every row of a unit its place among the different ones, those)."""
    first_of, unique = unique_rows(encoded)
    _, firsts = np.unique(first_of, return_index=True)
    return first_of, Rows(unique, [examples[i] for i in firsts], token_budget)


@dataclass(frozen=True)
class Loaded:
    """A stage ready to compute on a replica.

    Attributes:
        compute: vectors, norms and losses (NaN: none) of the rows that can be scored.
        device: what shards say of where they were made.
        notes: what they say beside.
    """

    compute: Callable[[Rows], Vectors]
    device: str
    notes: Callable[[], tuple[str, ...]] = tuple


@dataclass(frozen=True)
class RowStage:
    """One stage.

    Attributes:
        name: in the manifest, the plan, and of the folder in the cache.
        values: what changes its numbers, beside what decides a row's tokens: for its fingerprint.
        load: (config, the loaded model and its tools, the replica's device). Call the second only
            if the stage runs the model.
        flops: operations for a load of rows; the shape is None for a method without a model.
        layout: how its vectors are kept.
        reads_texts: whether `compute` asks for the rows' messages.
    """

    name: str
    values: Callable[[Config], dict[str, Any]]
    load: Callable[[Config, Callable[[], Toolbox], Callable[[], str]], Loaded]
    flops: Callable[[Config, ModelShape | None, Load], float]
    layout: Callable[[Config, ModelShape | None], VectorLayout]
    reads_texts: bool = False


def row_stage(config: Config, name: str) -> RowStage | None:
    """The stage of this name that the config's method has of its own; None: it has none."""
    return next((stage for stage in METHODS[config.method].stages if stage.name == name), None)
