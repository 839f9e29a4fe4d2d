"""Parquet files: their count, and rows by number from only the row groups that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from influence import storage
from influence.content import Hashing, SourceFile, changed
from influence.errors import InputError


def scan_parquet(url: str) -> tuple[str, int]:
    """Content hash and number of rows."""
    source = Hashing(storage.open_input(url))
    content_hash = source.finish()
    source.raw.close()
    with _parquet_file(url) as parquet:
        return content_hash, parquet.metadata.num_rows


def _parquet_file(url: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(url))
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{url}: not a Parquet file although named so ({error}); write it again or rename it"
        ) from error


def open_checked(file: SourceFile) -> pq.ParquetFile:
    """The open file, if it still has the rows that were counted."""
    parquet = _parquet_file(file.url)
    if parquet.metadata.num_rows != file.total_rows:
        raise changed(file.url)
    return parquet


def _group_bounds(parquet: pq.ParquetFile) -> list[tuple[int, int]]:
    """First row and row behind the last of every row group."""
    bounds, start = [], 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        bounds.append((start, stop))
        start = stop
    return bounds


@lru_cache(maxsize=2)
def _row_group(url: str, content_hash: str, group: int, names: tuple[str, ...]) -> pa.Table:
    """One row group, kept because successive ranges often share it."""
    try:
        with _parquet_file(url) as parquet:
            return parquet.read_row_group(group, columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: row group {group} cannot be read ({error})") from error


def read_rows(
    file: SourceFile, parquet: pq.ParquetFile, names: tuple[str, ...], first: int, last: int
) -> list[dict[str, Any]]:
    """Rows `first` to `last` (both included) with the columns `names`."""
    rows: list[dict[str, Any]] = []
    for group, (start, stop) in enumerate(_group_bounds(parquet)):
        low, high = max(first, start), min(last + 1, stop)
        if low < high and names:
            table = _row_group(file.url, file.content_hash, group, names)
            rows += table.slice(low - start, high - low).to_pylist()
        elif low < high:
            rows += [{} for _ in range(low, high)]
    return rows


def take_rows(file: SourceFile, parquet: pq.ParquetFile, rows: Sequence[int]) -> pa.Table:
    """All columns of these rows, in the order given."""
    names = tuple(parquet.schema_arrow.names)
    wanted = sorted(set(rows))
    tables = [parquet.schema_arrow.empty_table()]
    for group, (start, stop) in enumerate(_group_bounds(parquet)):
        local = [row - start for row in wanted if start <= row < stop]
        if local:
            tables.append(_row_group(file.url, file.content_hash, group, names).take(local))
    place = {row: i for i, row in enumerate(wanted)}
    return pa.concat_tables(tables).take(pa.array([place[r] for r in rows], pa.int64()))
