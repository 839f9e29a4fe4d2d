"""Rows that other shards hold already: what is left to compute when the choice of rows changes.

Landmarks are few rows of each file, in shards named by their rows. When the pool grows or more
landmarks are asked for, the shards' names change, but most of the rows in them do not.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from influence import storage
from influence.cache import Cache, DamagedShardError
from influence.candidates import SourceFile
from influence.units import Unit, sparse_units

READERS = 8
_NAME = re.compile(r"([0-9a-f]+)-(\d+)-(\d+)(?:-[0-9a-f]{16})?\.parquet")


@dataclass(frozen=True)
class RowUnits:
    """Units that together hold the wanted rows of one file, and where each row comes from.

    Attributes:
        own: units that stand in the cache under the name that a first run gives them.
        lenders: other shards of the same stage, fingerprint and file, by key.
        rest: units to compute.
        borrowed: number of rows that are read from lenders.
    """

    own: list[Unit]
    lenders: list[Unit]
    rest: list[Unit]
    borrowed: int

    @property
    def units(self) -> list[Unit]:
        """All units, in the order in which a row's first occurrence counts."""
        return [*self.own, *self.lenders, *self.rest]


def list_shards(cache: Cache, stage: str, fingerprint: str) -> list[str]:
    """Keys of the shards that the cache lists for a stage, sorted."""
    folder = f"{stage}/{fingerprint}"
    listed = storage.list_objects(cache.locate(folder))
    return sorted(f"{folder}/{info.url.rsplit('/', 1)[1]}" for info in listed)


def reuse_rows(
    cache: Cache,
    plan: Sequence[Unit],
    listed: Sequence[str],
    rows_per_shard: int,
    held: dict[str, list[int]],
) -> RowUnits:
    """Of the sparse units of one file (`sparse_units`), keep what is there and plan the rest.

    A unit that is listed under its own name is always kept: so a run that was killed goes on to
    the very same shards. The rows of the others are looked for in every other listed shard of the
    file, in the order of their keys, and what is found nowhere is cut in row order again. (A
    damaged lender is passed over here; a damaged shard of the plan is computed again by the job.)
    `held` remembers the rows of shards by key, so that rounds read each of them once.
    """
    there = set(listed)
    own = [unit for unit in plan if unit.key in there]
    missing = [unit for unit in plan if unit.key not in there]
    if not missing:
        return RowUnits(own, [], [], 0)
    file, needs = plan[0].file, plan[0].needs
    stage, fingerprint = plan[0].stage, plan[0].fingerprint
    rows_in_order = [row for unit in missing for row in unit.rows or ()]
    wanted = set(rows_in_order)
    mine = {unit.key for unit in own}
    keys = [key for key in listed if key not in mine and _may_hold(key, file, rows_in_order)]
    lenders = []
    unread = [key for key in keys if key not in held]
    with ThreadPoolExecutor(READERS) as readers:
        held |= zip(unread, readers.map(lambda key: _rows_of(cache, key), unread), strict=True)
    for key in keys:
        rows = held[key]
        if wanted.isdisjoint(rows):
            continue
        unit = Unit(stage, fingerprint, file, rows[0], rows[-1], needs=needs)
        if unit.key != key:
            unit = Unit(stage, fingerprint, file, rows[0], rows[-1], tuple(rows), needs=needs)
        if unit.key == key:
            lenders.append(unit)
            wanted.difference_update(rows)
    rest = sparse_units(stage, fingerprint, file, sorted(wanted), rows_per_shard, needs)
    return RowUnits(own, lenders, rest, len(rows_in_order) - len(wanted))


def _may_hold(key: str, file: SourceFile, wanted: Sequence[int]) -> bool:
    """Whether the name is one of this file, over a range with one of the (sorted) rows in it."""
    match = _NAME.fullmatch(key.rsplit("/", 1)[1])
    if match is None or match[1] != file.content_hash:
        return False
    first, last = int(match[2]), int(match[3])
    following = bisect_left(wanted, first)
    return following < len(wanted) and wanted[following] <= last


def _rows_of(cache: Cache, key: str) -> list[int]:
    try:
        return cache.read(key).table.column("row").to_pylist()
    except DamagedShardError:
        return []
