"""Stages of a method's own: numbers for every row, computed by the replicas and kept as shards.

Adding one needs no change in the worker: a method names it (`Method.stages`), and the replicas,
fingerprints, the plan and the cache's listing find it there. See docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int

from influence.batching import Batch, make_batches
from influence.candidates import Example
from influence.config import Config
from influence.load import Load
from influence.memory import computed
from influence.methods import METHODS
from influence.schemas import VectorLayout
from influence.stages import Toolbox, Vectors
from influence.tokenization import Encoded
from influence.unit_tables import unique_rows

if TYPE_CHECKING:
    from influence.model_shape import ModelShape


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
) -> tuple[Int[np.ndarray, " n"], Rows]:
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


def number_of_each(
    tools: Toolbox, rows: Rows, compute: Callable[[Batch], Float[np.ndarray, " b"]]
) -> Vectors:
    """One number for every row, in float64 in the shards' column `loss`, by the model.

    compute: of the rows of a batch, which is on the replica's device; called without autograd, and
    with smaller batches where memory runs out.
    """

    def of_batch(batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return compute(batch.to(tools.replica.device))

    parts, positions = [], []
    for batch, found in computed(rows.batches, tools.limit, of_batch):
        parts.append(found)
        positions += batch.positions
    numbers = np.concatenate(parts).astype(np.float64)
    column = numbers[:, None].astype(np.float32)  # a shard's rows have a vector
    return Vectors(np.asarray(positions), column, np.full(len(numbers), np.nan), numbers)


def number_layout(_config: Config, _shape: ModelShape | None) -> VectorLayout:
    """How `number_of_each` is kept."""
    return VectorLayout(dtype="float32", dim=1)


def on_model(
    compute: Callable[[Toolbox, Rows], Vectors],
) -> Callable[[Config, Callable[[], Toolbox], Callable[[], str]], Loaded]:
    """`RowStage.load` of a stage that needs the model and nothing else."""

    def load(_config: Config, tools: Callable[[], Toolbox], _device: Callable[[], str]) -> Loaded:
        box = tools()

        def notes() -> tuple[str, ...]:
            return (*box.replica.notes, *([box.limit.note] if box.limit.note else []))

        return Loaded(partial(compute, box), box.replica.device_name, notes)

    return load


def row_stage(config: Config, name: str) -> RowStage | None:
    """The stage of this name that the config's method has of its own; None: it has none."""
    return next((stage for stage in METHODS[config.method].stages if stage.name == name), None)
