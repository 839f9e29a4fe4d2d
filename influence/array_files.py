"""Named arrays and plain values as one object of a store, called by a digest of its contents.

What the replicas of a run need to compute alike: predictors, the queries of DataInf.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence import storage
from influence.errors import InputError

Arrays = Mapping[str, np.ndarray]


def digest_of(scalars: Mapping[str, Any], arrays: Arrays) -> str:
    """32 hex digits of all names, values, types, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dict(scalars), sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(repr((name, str(array.dtype), array.shape)).encode())
        digest.update(array.view(np.uint8).reshape(-1).data if array.size else b"")
    return digest.hexdigest()


def write_arrays(url: str, folder: str, scalars: Mapping[str, Any], arrays: Arrays) -> str:
    """Put them below a URL, once; returns the object's key."""
    key = f"{folder}/{digest_of(scalars, arrays)}.parquet"
    columns = {
        "name": list(arrays),
        "dtype": [str(array.dtype) for array in arrays.values()],
        "shape": [list(array.shape) for array in arrays.values()],
        "data": pa.array([array.tobytes() for array in arrays.values()], type=pa.large_binary()),
    }
    table = pa.table(columns, schema=_SCHEMA)
    table = table.replace_schema_metadata({b"scalars": json.dumps(dict(scalars)).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    put_named(url, key, sink.getvalue().to_pybytes(), lambda: read_arrays(url, key))
    return key


_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("dtype", pa.string()),
        pa.field("shape", pa.list_(pa.int64())),
        pa.field("data", pa.large_binary()),
    ]
)


def read_arrays(url: str, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(values, arrays) that `write_arrays` left.

    Raises:
        InputError: the object is not the one that its name says.
    """
    table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(url, key))))
    scalars = json.loads((table.schema.metadata or {})[b"scalars"])
    arrays = {}
    for place, name in enumerate(table.column("name").to_pylist()):
        dtype, shape = (table.column(c)[place].as_py() for c in ("dtype", "shape"))
        data = table.column("data")[place].as_buffer()
        arrays[name] = np.frombuffer(data, dtype).reshape(shape).copy()
    if f"{digest_of(scalars, arrays)}.parquet" != key.rsplit("/", 1)[1]:
        raise InputError(f"{key}: its contents are not what its name says; remove it")
    return scalars, arrays


def put_named(url: str, key: str, data: bytes, check: Any) -> None:
    """Put an object that is called by its contents; one that `check` cannot read is replaced."""
    where = storage.join(url, key)
    if storage.put_new(where, data):
        return
    try:
        check()
    except (InputError, pa.ArrowException, OSError, KeyError, ValueError):
        storage.put(where, data)
