"""How many bytes of the input files units of work read, from the files' own indexes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pyarrow.parquet as pq

from influence import storage
from influence.candidates import SourceFile
from influence.parquet_rows import open_checked
from influence.row_formats import COLUMNS
from influence.units import Unit

_READERS = 8
_READ_COLUMNS = (*COLUMNS, "id", "source")


def file_bytes(file: SourceFile) -> int:
    """Size of the file as it is stored."""
    if file.stamp is not None:
        return int(file.stamp.split(" ", 1)[0])
    info = storage.head(file.url)
    return 0 if info is None else info.size


def input_bytes(units: Sequence[Unit], replicas: int) -> int:
    """Bytes of input files that so many replicas read to compute units.

    A replica keeps what it has read last: a JSONL file, which is read whole, or a row group of a
    Parquet file. The replicas work on a file's units at the same time, so that each of them reads
    it, or as many of them as it has units.
    """
    by_file: dict[SourceFile, list[Unit]] = {}
    for unit in units:
        by_file.setdefault(unit.file, []).append(unit)
    with ThreadPoolExecutor(_READERS) as readers:  # a file's index is a request or two away
        return sum(readers.map(lambda file: _of_file(file, by_file[file], replicas), by_file))


def _of_file(file: SourceFile, units: Sequence[Unit], replicas: int) -> int:
    if not file.url.lower().endswith(".parquet"):
        return file_bytes(file) * min(replicas, len(units))
    starts, sizes = _row_groups(file)
    begin = np.searchsorted(starts, [unit.first for unit in units], side="right") - 1
    end = np.searchsorted(starts, [unit.last for unit in units], side="right")
    # How many units a row group has: one more from `begin` on, one less from `end` on.
    change = np.zeros(len(starts) + 1, dtype=np.int64)
    np.add.at(change, begin, 1)
    np.add.at(change, end, -1)
    return int(sizes @ np.minimum(np.cumsum(change)[:-1], replicas))


@lru_cache(maxsize=1 << 16)
def _row_groups(file: SourceFile) -> tuple[np.ndarray, np.ndarray]:
    """First row of every row group, and the bytes of the columns that are read of it."""
    with open_checked(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        rows = [group.num_rows for group in groups]
        sizes = [_read_size(group) for group in groups]
    starts = np.concatenate([[0], np.cumsum(rows)[:-1]]) if rows else np.zeros(0)
    return starts.astype(np.int64), np.asarray(sizes, dtype=np.int64)


def _read_size(group: pq.RowGroupMetaData) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(
        column.total_compressed_size
        for column in columns
        if column.path_in_schema.split(".", 1)[0] in _READ_COLUMNS
    )
