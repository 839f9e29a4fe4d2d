"""Parquet files: their count, and rows by number from only the row groups that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence import storage
from influence.content import Hashing, SourceFile, changed, check_unchanged
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
    """The open file, if it still is the one that was scanned."""
    check_unchanged(file)
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


def values_of_rows(
    file: SourceFile, parquet: pq.ParquetFile, names: tuple[str, ...], rows: Sequence[int]
) -> list[dict[str, Any]]:
    """The columns `names` of these rows, in the order given; one row group in memory at a time."""
    if not names:
        return [{} for _ in rows]
    found: dict[int, dict[str, Any]] = {}
    for group, local, start in _rows_by_group(parquet, rows):
        table = _row_group(file.url, file.content_hash, group, names).take(local)
        found.update(zip((start + row for row in local), table.to_pylist(), strict=True))
    return [found[int(row)] for row in rows]


def _rows_by_group(
    parquet: pq.ParquetFile, rows: Sequence[int]
) -> Iterator[tuple[int, list[int], int]]:
    """For each row group that holds some of the rows: its index, theirs in it, its first row."""
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    for group, (start, stop) in enumerate(_group_bounds(parquet)):
        low, high = np.searchsorted(wanted, (start, stop))
        if low < high:
            yield group, (wanted[low:high] - start).tolist(), start


def take_rows(file: SourceFile, parquet: pq.ParquetFile, rows: Sequence[int]) -> pa.Table:
    """All columns of these rows, in the order given."""
    names = tuple(parquet.schema_arrow.names)
    wanted = sorted({int(row) for row in rows})
    tables = [parquet.schema_arrow.empty_table()]
    for group, local, _ in _rows_by_group(parquet, wanted):
        tables.append(_row_group(file.url, file.content_hash, group, names).take(local))
    place = {row: i for i, row in enumerate(wanted)}
    return pa.concat_tables(tables).take(pa.array([place[int(r)] for r in rows], pa.int64()))
