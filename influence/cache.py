"""The gradient cache: shards committed whole or not at all, verified before they are believed.

A shard is serialised to memory and put once, create-only. "Already exists" counts as committed only
if the object is a whole shard of this unit; a damaged one is replaced on its ETag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence import storage
from influence.errors import InfluenceError, StorageError
from influence.schemas import FORMAT_VERSION, VectorLayout, layout_of
from influence.units import Unit, rows_are_of

_META = b"influence"
VERIFIERS = 8


class DamagedShardError(InfluenceError):
    """The bytes under a shard's name are no whole shard of its unit.

    A job looks at every shard before it uses it. One that is damaged after that ends the job: the
    same command finds it, makes it anew and goes on.
    """

    exit_code = 3


@dataclass(frozen=True)
class Shard:
    """A verified shard in memory.

    Attributes:
        table: the columns; see `influence.schemas`.
        meta: format version, stage, fingerprint, rows; tokens, devices, notes.
    """

    table: pa.Table
    meta: dict[str, Any]

    @property
    def layout(self) -> VectorLayout:
        """Layout of the `vector` column."""
        return layout_of(self.table.schema)

    def vectors(self) -> np.ndarray:
        """The `vector` column as an array (rows x dim); rows with a null vector are NaN."""
        return fixed_width(self.table, "vector", np.dtype(self.layout.dtype))

    def floats(self, name: str) -> np.ndarray:
        """A numeric column as float64, null as NaN."""
        return self.table.column(name).cast(pa.float64()).to_numpy()


def fixed_width(table: pa.Table, name: str, dtype: Any) -> np.ndarray:
    """A fixed-size binary column as an array (rows x width); null rows are NaN."""
    dtype = np.dtype(dtype)
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    start = column.offset * width
    flat = data[start : start + len(column) * width].view(dtype)
    array = flat.reshape(len(column), width // dtype.itemsize)
    if column.null_count:
        array = array.copy()
        array[np.asarray(column.is_null())] = np.nan
    return array


def vector_column(vectors: np.ndarray, missing: np.ndarray) -> pa.Array:
    """Pack an array (n x dim) as fixed-size binary; `missing` (n,) rows become null."""
    contiguous = np.ascontiguousarray(vectors)
    width = contiguous.dtype.itemsize * contiguous.shape[1]
    validity = None
    if missing.any():
        bits = np.packbits(~missing, bitorder="little")
        validity = pa.py_buffer(bits.tobytes())
    return pa.Array.from_buffers(
        pa.binary(width), len(contiguous), [validity, pa.py_buffer(contiguous)]
    )


def serialise(unit: Unit, table: pa.Table, meta: dict[str, Any]) -> bytes:
    """One uncompressed Parquet file: one row group, page checksums, facts in its footer."""
    document = {
        **meta,
        "format_version": FORMAT_VERSION,
        "key": unit.key,
        "rows": table.num_rows,
    }
    document["digest"] = _footer_digest(table.schema, document)
    metadata = {**(table.schema.metadata or {}), _META: json.dumps(document).encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        row_group_size=max(1, table.num_rows),
    )
    return sink.getvalue().to_pybytes()


def parse(data: bytes, key: str) -> Shard:
    """Read a shard from bytes and verify footer, checksums, name and row count.

    Raises:
        DamagedShardError: anything of that does not hold.
    """
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        meta = dict(json.loads((table.schema.metadata or {})[_META]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(key, f"not a whole shard ({type(error).__name__}: {error})") from None
    if meta.get("format_version") != FORMAT_VERSION or meta.get("key") != key:
        raise _damaged(key, f"holds {meta.get('key')!r}, format {meta.get('format_version')}")
    if meta.get("rows") != table.num_rows:
        raise _damaged(key, f"{table.num_rows} rows, its footer says {meta.get('rows')}")
    # Pages have checksums, the footer has none: a changed name, type or fact shows here only.
    if meta.get("digest") != _footer_digest(table.schema, meta):
        raise _damaged(key, "its footer is not the one that was written")
    if "row" in table.column_names and not rows_are_of(key, table.column("row").to_numpy()):
        raise _damaged(key, "holds other rows than its name says")
    return Shard(table, meta)


def _damaged(key: str, what: str) -> DamagedShardError:
    return DamagedShardError(f"{key}: {what}; the same command computes this shard anew")


def _footer_digest(schema: pa.Schema, meta: dict[str, Any]) -> str:
    """Digest of the columns, the schema's other metadata and the facts."""
    fields = [[field.name, str(field.type), field.nullable] for field in schema]
    others = {str(k): str(v) for k, v in (schema.metadata or {}).items() if k != _META}
    facts = {name: value for name, value in meta.items() if name != "digest"}
    text = json.dumps([fields, others, facts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Cache:
    """The cache directory at a URL. Holds no state but the URL, so every actor has its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def locate(self, key: str) -> str:
        """URL of a shard."""
        return storage.join(self.url, key)

    def read(self, key: str) -> Shard:
        """Read and verify one shard."""
        return parse(storage.read_bytes(self.locate(key)), key)

    def read_columns(self, key: str, columns: Sequence[str]) -> pa.Table:
        """Of these columns those that a shard has, without reading the others; verified as far.

        Raises:
            DamagedShardError: its footer or a page of these columns is not what was written.
        """
        try:
            with pq.ParquetFile(
                storage.open_input(self.locate(key)), page_checksum_verification=True
            ) as file:
                schema = file.schema_arrow
                meta = dict(json.loads((schema.metadata or {})[_META]))
                table = file.read([name for name in columns if name in schema.names])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DamagedShardError(
                f"{key}: not a whole shard ({type(error).__name__}: {error})"
            ) from None
        if meta.get("key") != key or meta.get("digest") != _footer_digest(schema, meta):
            raise DamagedShardError(f"{key}: its footer is not the one that was written")
        return table

    def verified(self, key: str) -> bool:
        """Whether a whole shard stands under this name; a damaged one counts as missing."""
        if storage.head(self.locate(key)) is None:
            return False
        try:
            self.read(key)
        except DamagedShardError:
            return False
        return True

    def commit(self, unit: Unit, table: pa.Table, meta: dict[str, Any]) -> str:
        """Put a shard create-only. Returns "created", "exists" or "replaced".

        Raises:
            StorageError: the object under this name is damaged and could not be replaced.
        """
        data = serialise(unit, table, meta)
        url = self.locate(unit.key)
        if storage.put_new(url, data):
            return "created"
        if self.verified(unit.key):
            return "exists"
        damaged = storage.head(url)
        if damaged is None:
            return "created" if storage.put_new(url, data) else self._settle(unit.key)
        if storage.replace(url, data, damaged.etag):
            return "replaced"
        return self._settle(unit.key)

    def _settle(self, key: str) -> str:
        """Another writer was faster: its shard must be whole."""
        if self.verified(key):
            return "exists"
        raise StorageError(
            f"{self.locate(key)}: the object under this name is damaged and another writer keeps "
            "changing it; stop other jobs on this cache and run the same command again"
        )

    def present(self, keys: Sequence[str]) -> set[str]:
        """Of these keys, those whose object is listed (not yet verified)."""
        folders = {key.rsplit("/", 1)[0] for key in keys}
        listed: set[str] = set()
        for folder in folders:
            for info in storage.list_objects(self.locate(folder)):
                listed.add(f"{folder}/{info.url.rsplit('/', 1)[1]}")
        return listed.intersection(keys)

    def verify(self, keys: Sequence[str]) -> set[str]:
        """Of these keys, those under which a whole shard stands; reads all of them."""
        with ThreadPoolExecutor(VERIFIERS) as readers:
            return {
                key
                for key, whole in zip(keys, readers.map(self.verified, keys), strict=True)
                if whole
            }
