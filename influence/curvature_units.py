"""DataInf's pass 1 as units of work: partial sums over fixed groups of gradient shards.

Which shards make a group follows from their number and the size of a sum alone, and groups are
added up in their order: the result does not depend on who computed what, or when. Sums, and what
they are computed from, lie beside a run's score shards and go with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float

from influence import storage
from influence.array_files import put_named, read_arrays, write_arrays
from influence.cache import Cache, vector_column
from influence.catalogue import Catalogue
from influence.datainf import CurvatureSums, GradientSums
from influence.errors import InputError
from influence.fingerprints import fingerprint
from influence.gradient_rows import gradient_rows, layer_blocks
from influence.schemas import VectorLayout, score_shard_schema
from influence.units import Unit

STAGE = "curvature"
MOST_GROUPS = 64
GROUPS_BYTES = 4 * 10**9
"""What the sums of all groups together may take of the store."""


@dataclass(frozen=True)
class Query:
    """What pass 1 multiplies the gradients with.

    targets: mean gradients of the targets' columns; damping: of every layer; unit: whether
    candidates' gradients are brought to length 1; exponent: else, the power of their response
    tokens that they are multiplied with; plain: the gradients are summed up as they are.
    """

    targets: Float[np.ndarray, "m d"]
    damping: Float[np.ndarray, " layers"]
    unit: bool
    exponent: float = 0.0
    plain: bool = False


def write_query(url: str, query: Query) -> str:
    """Put it below a URL; returns its key."""
    arrays = {"targets": query.targets, "damping": query.damping}
    scalars = {"unit": query.unit, "exponent": query.exponent, "plain": query.plain}
    return write_arrays(url, "query", scalars, arrays)


def read_query(url: str, key: str) -> Query:
    """Read what `write_query` left."""
    scalars, arrays = read_arrays(url, key)
    return Query(**arrays, **scalars)


def curvature_units(
    url: str,
    gradients: Sequence[Unit],
    counted: Bool[np.ndarray, " n"],
    pool: Catalogue,
    query: str,
    bytes_each: int,
) -> list[Unit]:
    """The units of pass 1 over these gradient shards, for the query of this key.

    counted: rows of the pool that count. bytes_each: of one group's sums. Writes which rows of
    which shards each group takes in.
    """
    units = []
    for places in _groups(len(gradients), bytes_each):
        members = [gradients[place] for place in places]
        masks = [
            np.packbits(counted[pool.positions(unit.file, unit.row_numbers)]).tobytes().hex()
            for unit in members
        ]
        key = _write_members(url, [unit.key for unit in members], masks)
        digest = fingerprint({"query": query, "members": key}).hex
        file, end = members[0].file, members[-1]
        # For messages: the group's rows, as far as they are of one file.
        last = end.last if end.file == file else file.rows - 1
        units.append(Unit(STAGE, digest, file, members[0].first, last, needs=(query, key)))
    return units


def group_count(count: int, bytes_each: int) -> int:
    """Groups of so many gradient shards."""
    return max(1, min(count, MOST_GROUPS, GROUPS_BYTES // bytes_each))


def _groups(count: int, bytes_each: int) -> list[np.ndarray]:
    parts = np.array_split(np.arange(count), group_count(count, bytes_each))
    return [places for places in parts if len(places)]


def _write_members(url: str, keys: Sequence[str], masks: Sequence[str]) -> str:
    data = json.dumps([list(pair) for pair in zip(keys, masks, strict=True)]).encode()
    key = f"members/{hashlib.blake2b(data, digest_size=16).hexdigest()}.json"
    put_named(url, key, data, lambda: _read_members(url, key))
    return key


def _read_members(url: str, key: str) -> list[tuple[str, np.ndarray]]:
    """(key of a gradient shard, which of its rows count, padded to whole bytes) of a group.

    Raises:
        InputError: the object is not the one that its name says.
    """
    data = storage.read_bytes(storage.join(url, key))
    if f"members/{hashlib.blake2b(data, digest_size=16).hexdigest()}.json" != key:
        raise InputError(f"{key}: its contents are not what its name says; remove it")
    return [
        (shard, np.unpackbits(np.frombuffer(bytes.fromhex(mask), np.uint8)).astype(bool))
        for shard, mask in json.loads(data)
    ]


def curvature_table(
    cache: Cache, url: str, unit: Unit, query: Query, device: str
) -> tuple[pa.Table, dict[str, Any]]:
    """The sums of one group, a row for each of the targets' columns, and how many rows are in."""
    targets = torch.from_numpy(query.targets).to(device)
    damping = torch.from_numpy(query.damping)
    sums: CurvatureSums | GradientSums | None = None
    _query, members = unit.needs
    for key, counted in _read_members(url, members):
        shard = cache.read(key)
        rows = gradient_rows(shard, unit=query.unit, exponent=query.exponent)
        if rows is None:
            continue
        if sums is None and query.plain:
            sums = GradientSums(targets)
        elif sums is None:
            sums = CurvatureSums(targets, layer_blocks(shard.layout), damping)
        kept = counted[: len(rows.usable)][rows.usable]
        vectors = torch.from_numpy(rows.vectors[kept]).to(device)
        sums.add(vectors, torch.from_numpy(rows.norms[kept]).to(device))
    values = np.zeros(query.targets.shape) if sums is None else sums.sums.cpu().numpy()
    layout = VectorLayout(dtype="float64", dim=int(query.targets.shape[1]))
    columns = [
        pa.array(np.arange(len(values))),
        vector_column(values, np.zeros(len(values), dtype=bool)),
    ]
    # Its rows are columns of the targets, and no rows of a file.
    schema = score_shard_schema(layout).set(0, pa.field("column", pa.int64(), nullable=False))
    table = pa.Table.from_arrays(columns, schema=schema)
    return table, {"counted": 0 if sums is None else sums.rows}


def add_up(cache: Cache, units: Sequence[Unit]) -> tuple[Float[torch.Tensor, "m d"], int]:
    """The sums of all groups, in their order, and the rows in them; one group is held at a time."""
    total: np.ndarray | None = None
    rows = 0
    for unit in units:
        shard = cache.read(unit.key)
        if total is None:
            total = shard.vectors().copy()
        else:
            total += shard.vectors()
        rows += int(shard.meta["counted"])
    assert total is not None  # there is a group
    return torch.from_numpy(total), rows
