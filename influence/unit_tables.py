"""The tables of shards: encoded rows, and the vectors that a stage computed for some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from influence.cache import vector_column
from influence.schemas import (
    ROW_FIELDS,
    VectorLayout,
    catalogue_schema,
    shard_schema,
    target_vector_schema,
)
from influence.stages import Vectors
from influence.tokenization import Encoded


def unique_rows(encoded: Sequence[Encoded]) -> tuple[np.ndarray, list[Encoded]]:
    """Rows with the same messages are computed once: (index into the unique rows, unique rows)."""
    first: dict[bytes, int] = {}
    found: list[Encoded] = []
    index = np.empty(len(encoded), dtype=np.int64)
    for position, row in enumerate(encoded):
        if row.digest not in first:
            first[row.digest] = len(found)
            found.append(row)
        index[position] = first[row.digest]
    return index, found


def target_vector_table(vector: Mapping[str, torch.Tensor]) -> pa.Table:
    """One row a layer; see `influence.schemas.target_vector_schema`."""
    rows = {
        "layer": list(vector),
        "out_features": [value.shape[0] for value in vector.values()],
        "in_features": [value.shape[1] for value in vector.values()],
        "vector": [value.numpy().tobytes() for value in vector.values()],
    }
    return pa.table(rows, schema=target_vector_schema())


def row_table(encoded: Sequence[Encoded]) -> pa.Table:
    """What every shard says of its rows: a catalogue shard is nothing else."""
    columns = {field.name: [getattr(row, field.name) for row in encoded] for field in ROW_FIELDS}
    return pa.table(columns, schema=catalogue_schema())


def vector_table(
    encoded: Sequence[Encoded], first_of: np.ndarray, columns: Vectors | None
) -> pa.Table:
    """Spread the computed vectors over the unit's rows; rows without one get nulls."""
    rows = row_table(encoded)
    if columns is None:
        columns = Vectors(
            np.empty(0, np.int64), np.empty((0, 1), np.float32), np.empty(0), np.empty(0)
        )
    slot = np.full(int(first_of.max(initial=-1)) + 1, -1, dtype=np.int64)
    slot[columns.positions] = np.arange(len(columns.positions))
    source = slot[first_of] if len(first_of) else np.empty(0, np.int64)
    missing = source < 0
    width = columns.vectors.shape[1]
    vectors = np.zeros((len(encoded), width), dtype=columns.vectors.dtype)
    vectors[~missing] = columns.vectors[source[~missing]]
    layout = VectorLayout(
        dtype=str(vectors.dtype), dim=width, blocks=columns.blocks, sizes=columns.sizes
    )
    arrays = [*rows.columns, vector_column(vectors, missing)]
    for values in (columns.norm, columns.loss):
        spread = np.full(len(encoded), np.nan)
        spread[~missing] = values[source[~missing]]
        arrays.append(pa.array(spread, type=pa.float64(), mask=np.isnan(spread)))
    if columns.norms is not None:
        norms = np.zeros((len(encoded), columns.norms.shape[1]), dtype=np.float32)
        norms[~missing] = columns.norms[source[~missing]]
        arrays.append(vector_column(norms, missing))
    return pa.Table.from_arrays(arrays, schema=shard_schema(layout))
