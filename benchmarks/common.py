"""What the benchmark scripts share: named paths, evenly spread rows, whole files."""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from influence import storage
from influence.errors import InputError


def named_paths(values: Sequence[str], flag: str) -> dict[str, str]:
    """{NAME: PATH} of NAME=PATH values; InputError for anything else or a name given twice."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path) or name in found or "/" in name:
            raise InputError(f"{flag} {value!r}: expected NAME=PATH with a name of its own")
        if not os.path.isfile(path):
            raise InputError(f"{flag} {value!r}: there is no such file")
        found[name] = path
    return found


def spread(count: int, limit: int) -> Int[np.ndarray, " k"]:
    """At most `limit` indices out of `count`, evenly spread: floor(j count / limit)."""
    if limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def write_json(path: Path, document: Any) -> None:
    """Whole or not at all: a killed writer leaves a temporary file, never half a result."""
    write_bytes(path, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one atomic step."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """InputError if a result at `path` was made with other settings."""
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{path}: made with {key}={found.get(key)!r}, not {wanted.get(key)!r}; "
                "use another --out, or remove it"
            )


def read_scores(run: str, columns: list[str] | None = None) -> pa.Table:
    """The scores of a run, one row per candidate in the pool's order (all columns by default)."""
    parts = [
        info.url
        for info in storage.list_objects(storage.join(run, "scores"))
        if info.url.endswith(".parquet")
    ]
    if not parts:
        raise InputError(f"{run}: no scores/part-*.parquet; expected the directory of a done run")
    tables = [pq.read_table(storage.open_input(part), columns=columns) for part in parts]
    return pa.concat_tables(tables)


@contextmanager
def embedded_ray(cpus: int) -> Iterator[None]:
    """A Ray of this machine, on loopback, with room for so many replicas."""
    import ray

    from ray_jobs.loopback import loopback_only

    with loopback_only():
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def memory_mb(key: str) -> float:
    """Resident memory of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) * 1.024e-3
    raise RuntimeError(f"/proc/self/status has no {key}")
