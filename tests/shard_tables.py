"""Builders of small catalogues, units and shards, with no model and no tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from influence.cache import Cache, vector_column
from influence.candidates import SourceFile
from influence.catalogue import Catalogue, build_catalogue
from influence.schemas import VectorLayout, catalogue_schema, shard_schema
from influence.units import Unit


def source_file(url: str, rows: int) -> SourceFile:
    """A file that need not exist; its content hash follows from its URL."""
    content = hashlib.blake2b(url.encode(), digest_size=16).hexdigest()
    return SourceFile(url, content, rows, rows)


def row_table(rows: Sequence[int], texts: Sequence[str] | None = None, **columns: Any) -> pa.Table:
    """A catalogue shard; `texts` stand for the messages (default: all different)."""
    n = len(rows)
    texts = texts if texts is not None else [f"text {row}" for row in rows]
    values: dict[str, Any] = {
        "id": [None] * n,
        "row": list(rows),
        "source": [None] * n,
        "group": [None] * n,
        "digest": [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts],
        "n_tokens": [10 + row for row in rows],
        "n_response_tokens": [5 + row for row in rows],
        "truncated": [False] * n,
        "reason": [None] * n,
    }
    return pa.table(values | columns, schema=catalogue_schema())


def one_catalogue(
    *parts: tuple[SourceFile, dict[str, Any]], drop_duplicates: bool = False
) -> Catalogue:
    """A catalogue of (file, columns of `row_table`) with texts that differ between files."""
    tables = []
    for file, columns in parts:
        texts = {"texts": [f"{file.url} {row}" for row in range(file.rows)]}
        tables.append((file, row_table(range(file.rows), **(texts | columns))))
    return build_catalogue([file for file, _ in parts], tables, drop_duplicates=drop_duplicates)


def vector_table(
    rows: Sequence[int],
    vectors: np.ndarray,
    norm: Sequence[float | None] | np.ndarray,
    blocks: Sequence[tuple[str, int, int]] = (),
) -> pa.Table:
    """A shard with vectors; a row whose norm is None has a null vector, norm and loss."""
    table = row_table(rows)
    missing = np.array([value is None for value in norm])
    layout = VectorLayout(dtype=str(vectors.dtype), dim=vectors.shape[1], blocks=list(blocks))
    numbers = pa.array([None if value is None else float(value) for value in norm], pa.float64())
    arrays = [*table.columns, vector_column(vectors, missing), numbers, numbers]
    return pa.Table.from_arrays(arrays, schema=shard_schema(layout))


def commit(cache: Cache, unit: Unit, vectors: np.ndarray, norm: Sequence[float | None]) -> Unit:
    """Commit a shard of this unit's rows."""
    rows = unit.rows if unit.rows is not None else range(unit.first, unit.last + 1)
    cache.commit(unit, vector_table(list(rows), vectors, norm), {"stage": unit.stage})
    return unit
