"""The cache: bits come back as they went in, and nothing damaged is ever believed."""

from __future__ import annotations

import threading
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_tables import source_file, vector_table

from influence import storage
from influence.cache import Cache, DamagedShardError, parse, serialise, vector_column
from influence.errors import StorageError
from influence.units import Unit

FILE = source_file("pool/a.jsonl", 40)
UNIT = Unit("embedding", "f" * 32, FILE, 0, 4)
OTHER = Unit("embedding", "f" * 32, FILE, 5, 9)
NORM = [1.0, None, 0.5, None, 2.0]


def _vectors(dtype: str, rows: int = 5, dim: int = 7) -> np.ndarray:
    """Random bits, so NaN payloads, infinities and subnormal numbers are among them."""
    rng = np.random.default_rng(3)
    width = np.dtype(dtype).itemsize * dim
    return rng.integers(0, 256, (rows, width), dtype=np.uint8).view(dtype)


def _table(first: int = 0, dtype: str = "float32") -> pa.Table:
    return vector_table(range(first, first + 5), _vectors(dtype), NORM)


@pytest.fixture(params=["local", "s3", "gs"])
def cache(request, tmp_path) -> Cache:
    """An empty cache on each kind of store."""
    if request.param == "local":
        return Cache(str(tmp_path / "cache"))
    if request.param == "gs":
        return Cache(request.getfixturevalue("gs_url"))
    return Cache(storage.join(request.getfixturevalue("s3_url"), uuid.uuid4().hex))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_vectors_come_back_bit_for_bit_and_nulls_as_nan(cache: Cache, dtype: str):
    written, blocks = _vectors(dtype), [("layer.a", 0, 3), ("layer.b", 3, 4)]
    table = vector_table(range(5), written, NORM, blocks)
    assert cache.commit(UNIT, table, {"tokens": 12, "notes": ["é"]}) == "created"
    shard = cache.read(UNIT.key)
    there = np.array([value is not None for value in NORM])
    read = shard.vectors()
    assert read.dtype == np.dtype(dtype)
    assert read[there].tobytes() == written[there].tobytes(), "bits changed on the way"
    assert np.isnan(read[~there]).all(), "a null vector must not look like numbers"
    assert shard.layout.blocks == blocks
    assert shard.meta["tokens"] == 12
    assert shard.meta["notes"] == ["é"]
    np.testing.assert_array_equal(shard.floats("norm"), [1.0, np.nan, 0.5, np.nan, 2.0])
    assert shard.table.drop_columns(["vector"]).equals(table.drop_columns(["vector"]))


def test_any_slice_of_a_table_has_the_vectors_of_its_rows():
    data = serialise(UNIT, _table(), {})
    shard = parse(data, UNIT.key)
    whole = shard.vectors()
    for start in range(5):
        for stop in range(start + 1, 6):
            part = type(shard)(shard.table.slice(start, stop - start), shard.meta).vectors()
            assert part.tobytes() == whole[start:stop].tobytes(), "the slice's offset was ignored"
    joined = type(shard)(pa.concat_tables([shard.table, shard.table.slice(2)]), shard.meta)
    assert joined.vectors().tobytes() == whole.tobytes() + whole[2:].tobytes(), "chunks mixed up"


def test_strided_vectors_are_packed_row_by_row():
    wide = _vectors("float32", 5, 14)
    column = vector_column(wide[:, ::2], np.zeros(5, dtype=bool))
    assert column.null_count == 0
    assert b"".join(column.to_pylist()) == wide[:, ::2].tobytes()


def test_a_shard_is_one_uncompressed_row_group():
    parquet = pq.ParquetFile(pa.BufferReader(serialise(UNIT, _table(), {})))
    assert parquet.metadata.num_row_groups == 1
    column = parquet.metadata.row_group(0).column(parquet.schema_arrow.names.index("vector"))
    assert column.compression == "UNCOMPRESSED"
    assert column.total_uncompressed_size == column.total_compressed_size


def test_the_second_commit_finds_the_first(cache: Cache):
    assert cache.commit(UNIT, _table(), {"tokens": 1}) == "created"
    assert cache.commit(UNIT, _table(), {"tokens": 2}) == "exists"
    assert cache.read(UNIT.key).meta["tokens"] == 1, "a whole shard was written over"


def _flipped(data: bytes) -> bytes:
    """One bit of the vectors turned over."""
    table = pq.read_table(pa.BufferReader(data))
    row = table.column("vector")[4].as_py()
    assert data.count(row) == 1
    place = data.index(row) + 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "zero bytes": lambda data: b"",
    "cut in the pages": lambda data: data[:200],
    "cut in the footer": lambda data: data[:-9],
    "last byte missing": lambda data: data[:-1],
    "a bit of a vector": _flipped,
    "another unit's shard": lambda data: serialise(OTHER, _table(5), {}),
    "another stage's shard": lambda data: serialise(
        Unit("gradients", "f" * 32, FILE, 0, 4), _table(), {}
    ),
    "a column renamed": lambda data: data.replace(b"n_response_tokens", b"n_response_tokenz"),
    "no shard at all": lambda data: b"PAR1 is how it starts and ends PAR1",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_mended(cache: Cache, kind: str):
    whole = serialise(UNIT, _table(), {"tokens": 12})
    damaged = DAMAGE[kind](whole)
    assert damaged != whole
    url = cache.locate(UNIT.key)
    storage.put(url, damaged)
    assert not cache.verified(UNIT.key), f"{kind}: taken for a committed shard"
    assert cache.verify([UNIT.key]) == set()
    with pytest.raises(DamagedShardError, match=UNIT.key):
        cache.read(UNIT.key)
    assert cache.commit(UNIT, _table(), {"tokens": 12}) == "replaced"
    assert storage.read_bytes(url) == whole
    assert cache.verified(UNIT.key)


def test_no_single_damaged_byte_changes_what_is_read():
    """Pages have checksums and the footer a digest: all bytes in turn, none may go unnoticed."""
    vectors = np.arange(6, dtype=np.float16).reshape(3, 2)
    unit = Unit("embedding", "f" * 32, FILE, 0, 2)
    data = serialise(unit, vector_table(range(3), vectors, [1.0, None, 2.0]), {"tokens": 5})
    good = parse(data, unit.key)
    noticed = 0
    for place in range(0, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        try:
            read = parse(bytes(damaged), unit.key)
        except DamagedShardError:
            noticed += 1
            continue
        assert read.table.cast(good.table.schema).equals(good.table), f"byte {place}: other values"
        assert read.table.schema.names == good.table.schema.names, f"byte {place}: other names"
        assert read.layout == good.layout, f"byte {place}: other layout"
        facts = {name: read.meta.get(name) for name in ("tokens", "rows", "key")}
        assert facts == {"tokens": 5, "rows": 3, "key": unit.key}, f"byte {place}: other facts"
    assert noticed > len(data) / 2, "hardly any damage was noticed: are the checksums on?"


def test_verify_finds_the_whole_ones_among_many(cache: Cache):
    units = [Unit("embedding", "f" * 32, FILE, first, first + 4) for first in range(0, 40, 5)]
    for unit in units[:4]:
        cache.commit(unit, _table(unit.first), {})
    storage.put(cache.locate(units[1].key), b"damaged")
    keys = [unit.key for unit in units]
    assert cache.present(keys) == set(keys[:4]), "present() lists, it does not verify"
    assert cache.verify(keys) == {keys[0], keys[2], keys[3]}
    assert cache.present([]) == set()


def test_two_writers_of_one_unit_leave_one_whole_shard(cache: Cache):
    start, outcomes = threading.Barrier(2), {}
    tables = [vector_table(range(5), _vectors("float32", 5, 4000), NORM) for _ in range(2)]

    def write(writer: int) -> None:
        start.wait()
        outcomes[writer] = cache.commit(UNIT, tables[writer], {"tokens": writer})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes.values()) == ["created", "exists"], "not exactly one writer won"
    winner = next(writer for writer, outcome in outcomes.items() if outcome == "created")
    assert cache.read(UNIT.key).meta["tokens"] == winner, "the loser's bytes stand there"


def test_two_writers_of_a_damaged_shard_leave_a_whole_one(cache: Cache):
    storage.put(cache.locate(UNIT.key), b"damaged")
    start, outcomes = threading.Barrier(2), []

    def write() -> None:
        start.wait()
        outcomes.append(cache.commit(UNIT, _table(), {}))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "replaced" in outcomes
    assert set(outcomes) <= {"replaced", "exists"}
    assert storage.read_bytes(cache.locate(UNIT.key)) == serialise(UNIT, _table(), {})


def test_damage_that_cannot_be_mended_stops_the_job(tmp_path, monkeypatch):
    cache = Cache(str(tmp_path))
    storage.put(cache.locate(UNIT.key), b"damaged")
    monkeypatch.setattr(storage, "replace", lambda url, data, etag: False)
    with pytest.raises(StorageError, match="damaged"):
        cache.commit(UNIT, _table(), {})
