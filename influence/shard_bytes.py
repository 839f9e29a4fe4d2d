"""How many bytes a shard will have, before it is made: from its rows, its vectors and its schema.

Shards are not compressed, so what a row takes is what its columns take; a footer is measured once
on a shard of one row. Texts (ids, sources) are as long as the catalogue's shards of the file say.
"""

from __future__ import annotations

from functools import lru_cache

import pyarrow as pa
import torch

from influence.cache import serialise
from influence.candidates import SourceFile
from influence.schemas import (
    VectorLayout,
    catalogue_schema,
    score_shard_schema,
    shard_schema,
    target_vector_schema,
)
from influence.units import Unit

# Stages whose rows have a norm and a loss; those of others have one of them.
_WITH_BOTH = ("gradients", "target_gradients", "inner_products", "offset_products")
# A column of a shard that may be null says of every row whether it is: a bit or, in runs, less.
_NUMBER = {"float16": 2, "float32": 4, "float64": 8}


def vector_shard(
    stage: str, layout: VectorLayout, rows: int, vectors: int, texts: float, *, sparse: bool = False
) -> int:
    """A shard of so many rows, of which so many have a vector; `texts` are bytes of one row's."""
    schema = shard_schema(layout)
    numbers = 16 if stage in _WITH_BOTH else 8
    if layout.sizes:
        numbers += 4 * len(layout.blocks)  # every layer's norm
    payload = rows * (_fixed(catalogue_schema()) + texts)
    payload += vectors * (_NUMBER[layout.dtype] * layout.dim + numbers)
    return round(_overhead(stage, schema, sparse) + payload)


def score_shard(columns: int, rows: int) -> int:
    """Predicted scores and their variance, of so many rows."""
    schema = score_shard_schema(VectorLayout(dtype="float64", dim=columns + 1))
    return _overhead("scores", schema, False) + rows * 8 * (columns + 2)


def curvature_shard(columns: int, width: int) -> int:
    """DataInf's sums over one group of gradient shards: a row for each column."""
    return score_shard(width - 1, columns)


def target_vector(sizes: dict[str, int]) -> int:
    """One column's mean gradient: every layer's name, shape and numbers (float32)."""
    rows = sum(4 + len(name) + 16 + 4 + 4 * size for name, size in sizes.items())
    return _overhead("target_vectors", target_vector_schema(), True) + rows


def texts_of_row(shards: int, rows: int, size: int) -> float:
    """Mean bytes of a row's texts, from a file's catalogue shards and their bytes together."""
    schema = catalogue_schema()
    texts = (size - shards * _overhead("catalogue", schema, False)) / max(1, rows)
    return max(0.0, texts - _fixed(schema))


def _fixed(schema: pa.Schema) -> float:
    """Bytes of a row's columns of fixed width, but for the vector."""
    widths = {pa.int64(): 8, pa.int32(): 4, pa.binary(16): 16, pa.bool_(): 1 / 8}
    return sum(widths.get(field.type, 0) for field in schema if not field.nullable)


@lru_cache(maxsize=64)
def _overhead(stage: str, schema: pa.Schema, sparse: bool) -> int:
    """What a shard takes beside its rows: measured on one row without a vector."""
    arrays = []
    for field in schema:
        if field.nullable:
            arrays.append(pa.nulls(1, field.type))
        elif pa.types.is_fixed_size_binary(field.type):
            arrays.append(pa.array([bytes(field.type.byte_width)], field.type))
        elif pa.types.is_string(field.type) or pa.types.is_large_binary(field.type):
            arrays.append(pa.array([""], pa.string()).cast(field.type))
        else:
            arrays.append(pa.array([0], pa.int8()).cast(field.type))
    table = pa.Table.from_arrays(arrays, schema=schema)
    file = SourceFile("", "0" * 32, 1, 1)
    unit = Unit(stage, "0" * 32, file, 1000, 1999, rows=(1000, 1999) if sparse else None)
    meta = {
        "stage": stage,
        "fingerprint": unit.fingerprint,
        "first": unit.first,
        "last": unit.last,
        "tokens": 100_000,
        "device": "cpu",
        "notes": [],
        "torch": torch.__version__,
    }
    return len(serialise(unit, table, meta)) - round(_fixed(schema))
