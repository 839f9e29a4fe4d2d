"""Vectors of the size of the attributed parameters, in a worker: targets, directions, H v, and b.

Each becomes a shard with one row for every layer (`influence.schemas.target_vector_schema`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from influence.array_files import read_arrays
from influence.batching import Batch
from influence.cache import Cache
from influence.errors import InputError
from influence.gradients import make_engine, weighted_gradients
from influence.hvp import hessian_products
from influence.memory import restarted
from influence.stages import Toolbox, Vectors, inner_products, target_vector
from influence.tokenization import Encoded
from influence.units import Bundle, Unit

Vector = dict[str, Float[Tensor, "out in"]]

HESSIAN_MEMORY = 4
"""A Hessian-vector product's memory for each token, against a gradient's: it has the graphs of the
forward and the backward pass, attention's whole matrix of probabilities in both. Measured: 18 GB
for 2,048 tokens of a model of 135M parameters, whose gradients take 5 GB."""

ALONG_BYTES = 2 * 10**9
"""What directions that share a pass may take; a worker holds about four times as much: themselves
as parameters are stored, too, and the sums of products twice."""


def full_vectors(
    bundle: Bundle,
    tools: Toolbox,
    batches: Sequence[Batch],
    encoded: Sequence[Encoded],
    cache: Cache,
    scoring: str,
) -> list[Vector]:
    """The vector of every unit of a bundle, on the CPU in float32.

    `batches` are of `encoded`, the bundle's rows; `scoring` is where the weights of directions lie.

    Raises:
        InputError: none of the rows can be scored, or a target row has no usable gradient.
    """
    unit = bundle.units[0]
    if unit.stage == "offset_vector":
        # Of the model and the optimiser alone: the unit's row is a name for it.
        return [{name: value.float().cpu() for name, value in tools.offset.items()}]
    if not batches:
        raise InputError(
            f"{unit.file.url}: none of the rows {unit.first}..{unit.last} can be scored; see the "
            "reasons in the catalogue or drop the group"
        )
    if unit.stage == "target_vectors":
        names = [f"{unit.file.url} row {each.row}" for each in encoded]
        found = [target_vector(tools, batches, names)[0]]
    elif unit.stage == "directions":
        found = _directions(bundle, tools, batches, scoring)
    else:
        found = _hessian_products(bundle, tools, batches, cache)
    return [{name: value.float().cpu() for name, value in each.items()} for each in found]


def offset_products(tools: Toolbox, batches: Sequence[Batch]) -> Vectors:
    """Exact inner products of every row's gradient with the optimiser's offset b."""
    engine = make_engine(
        tools.replica.model,
        tools.layers,
        reduction=tools.settings.reduction,
        targets={name: value.unsqueeze(0) for name, value in tools.offset.items()},
    )
    return inner_products(tools, batches, engine)


def read_vectors(
    cache: Cache, targets: Sequence[Sequence[str]], device: torch.device
) -> dict[str, list[Float[Tensor, "m out in"]]]:
    """Full vectors {layer: one block for each of `targets`}, each of the shards of these keys."""
    found: dict[str, list[Tensor]] = {}
    for index, keys in enumerate(targets):
        for column, key in enumerate(keys):
            for name, values in read_vector(cache, key).items():
                blocks = found.setdefault(name, [])
                if index == len(blocks):
                    shape = (len(keys), *values.shape)
                    blocks.append(torch.empty(shape, dtype=torch.float32, device=device))
                blocks[index][column] = torch.from_numpy(values)
    return found


def read_vector(cache: Cache, key: str) -> dict[str, Float[np.ndarray, "out in"]]:
    """The full vector of a shard, by layer."""
    table = cache.read(key).table
    found = {}
    for position, name in enumerate(table.column("layer").to_pylist()):
        sizes = ("out_features", "in_features")
        shape = tuple(table.column(size)[position].as_py() for size in sizes)
        data = np.frombuffer(table.column("vector")[position].as_buffer(), np.float32)
        found[name] = data.copy().reshape(shape)
    return found


def _directions(
    bundle: Bundle, tools: Toolbox, batches: Sequence[Batch], scoring: str
) -> list[Vector]:
    """Weighted sums of the rows' steps a * g, one for every unit, from one pass."""
    columns = [_weights(scoring, unit) for unit in bundle.units]
    weights = torch.from_numpy(np.stack(columns, axis=1)).to(tools.replica.device)

    def compute(parts: Sequence[Batch], moved: Iterable[Batch]) -> dict[str, Tensor]:
        return weighted_gradients(
            tools.replica.model,
            tools.layers,
            moved,
            [weights[batch.positions] for batch in parts],
            reduction=tools.settings.reduction,
            scale=tools.scale("gradients"),
        )

    sums = restarted(batches, tools.limit, tools.replica.device, compute)
    return [{name: each[k] for name, each in sums.items()} for k in range(len(columns))]


def _weights(scoring: str, unit: Unit) -> Float[np.ndarray, " rows"]:
    (key,) = unit.needs
    return read_arrays(scoring, key)[1]["weights"]


def _hessian_products(
    bundle: Bundle, tools: Toolbox, batches: Sequence[Batch], cache: Cache
) -> list[Vector]:
    """H v of the mean loss of the rows for every unit's v, some from one pass.

    The same bits whatever directions share the pass: each has a backward pass of its own.
    """
    keys = [unit.needs[0] for unit in bundle.units]
    at_once = max(1, ALONG_BYTES // (4 * sum(layer.size for layer in tools.layers)))
    found = []
    for start in range(0, len(keys), at_once):
        blocks = read_vectors(cache, [keys[start : start + at_once]], tools.replica.device)
        found += _products(tools, batches, {name: block[0] for name, block in blocks.items()})
    return found


def _products(
    tools: Toolbox, batches: Sequence[Batch], along: Mapping[str, Float[Tensor, "r out in"]]
) -> list[Vector]:
    def compute(_parts: Sequence[Batch], moved: Iterable[Batch]) -> tuple[dict[str, Tensor], int]:
        return hessian_products(
            tools.replica.model, tools.layers, moved, along, reduction=tools.settings.reduction
        )

    sums, count = restarted(batches, tools.limit, tools.replica.device, compute)
    directions = len(next(iter(sums.values())))
    return [{name: each[k] / count for name, each in sums.items()} for k in range(directions)]
