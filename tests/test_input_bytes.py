"""Bytes of input files that units read: whole JSONL files, and row groups of Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence.candidates import SourceFile, scan_files
from influence.input_bytes import file_bytes, input_bytes
from influence.units import Unit


def _unit(file: SourceFile, first: int, last: int) -> Unit:
    return Unit("embedding", "f" * 32, file, first, last)


@pytest.fixture
def parquet(tmp_path: Path) -> SourceFile:
    """Three row groups of 10 rows; a column that is read beside a larger one that is not."""
    rows = [{"prompt": f"{i} " * 40, "completion": "x", "blob": "y" * 4000} for i in range(30)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, use_dictionary=False)
    return scan_files([str(path)])[0]


def _groups(file: SourceFile) -> list[int]:
    """Bytes of both read columns in every row group."""
    metadata = pq.ParquetFile(file.url).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [sum(group.column(c).total_compressed_size for c in (0, 1)) for group in groups]


def test_of_parquet_the_row_groups_count_that_hold_rows_and_their_columns_that_are_read(
    parquet: SourceFile,
) -> None:
    a, b, c = _groups(parquet)
    assert a + b + c < file_bytes(parquet) == Path(parquet.url).stat().st_size
    assert input_bytes([_unit(parquet, 0, 9)], 4) == a
    assert input_bytes([_unit(parquet, 8, 12)], 4) == a + b, "a shard over two row groups"
    assert input_bytes([_unit(parquet, 29, 29)], 4) == c
    assert input_bytes([], 4) == 0


def test_a_row_group_is_read_by_as_many_replicas_as_have_shards_of_it(parquet: SourceFile) -> None:
    a, b, _c = _groups(parquet)
    units = [_unit(parquet, first, first + 2) for first in (0, 3, 6, 9)]  # the last one in both
    assert input_bytes(units, 1) == a + b
    assert input_bytes(units, 2) == 2 * a + b
    assert input_bytes(units, 64) == 4 * a + b


def test_a_jsonl_file_is_read_whole_by_every_replica_with_a_shard_of_it(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    file = scan_files([str(path)])[0]
    size = path.stat().st_size
    units = [_unit(file, first, first + 9) for first in (0, 10, 20)]
    assert input_bytes(units[:1], 8) == size
    assert input_bytes(units, 2) == 2 * size
    assert input_bytes(units, 8) == 3 * size
