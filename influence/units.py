"""A unit of work: the rows of one range of one file, at one stage. One unit makes one shard."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from influence.candidates import SourceFile

FULL_VECTORS = frozenset({"target_vectors", "directions", "hessian_products", "offset_vector"})
"""Stages whose shards are one vector of the size of the attributed parameters each."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of a file for one stage; the shard's name follows from the contents alone.

    Attributes:
        stage: name of the stage (and of the folder in the cache).
        fingerprint: hex digest of everything else that changes the numbers.
        file: the file; its content hash, never its path, is in the shard's name.
        first: first row (from 0).
        last: last row, inclusive.
        rows: the rows, when not the whole range; increasing.
        group_by: the column that holds a target row's group.
        embedding: `influence.embedding_kind.EmbeddingKind`, where it is not the config's own.
        needs: keys of shards that this unit reads (target vectors).
        beside: rows of further files that count with it; only the fingerprint tells of them.
        checkpoint: folder or URL of the adapter, with the optimiser's state, that the model has for
            it instead of its own; only the fingerprint tells of it.
        against: names and files whose rows it is compared with; the fingerprint has their contents.
        tokens: of a training's rows, which are no range of its file's.
        label: what messages call it, where that is not its rows of its file.
        shards: how many shards' worth of work it is; its time limit is so many times theirs.
    """

    stage: str
    fingerprint: str
    file: SourceFile
    first: int
    last: int
    rows: tuple[int, ...] | None = None
    group_by: str | None = None
    embedding: tuple[str, int, int, str, int] | None = None
    needs: tuple[str, ...] = ()
    beside: tuple[tuple[SourceFile, tuple[int, ...]], ...] = ()
    checkpoint: str | None = None
    against: tuple[tuple[str, SourceFile], ...] = ()
    tokens: int = 0
    label: str = ""
    shards: int = 1

    @property
    def place(self) -> str:
        """As messages call it."""
        return self.label or f"{self.file.url} rows {self.first}-{self.last}"

    @property
    def key(self) -> str:
        """Name in the cache: STAGE/FINGERPRINT/CONTENT-FIRST-LAST[-ROWS].parquet."""
        name = f"{self.file.content_hash}-{self.first}-{self.last}"
        if self.rows is not None:
            name += f"-{hash_rows(self.rows)}"
        if self.group_by is not None:
            name += f"-{hashlib.blake2b(self.group_by.encode(), digest_size=4).hexdigest()}"
        return f"{self.stage}/{self.fingerprint}/{name}.parquet"

    @property
    def row_numbers(self) -> Sequence[int]:
        """The rows, in order."""
        return self.rows if self.rows is not None else range(self.first, self.last + 1)

    @property
    def count(self) -> int:
        """Number of rows."""
        own = len(self.rows) if self.rows is not None else self.last - self.first + 1
        return own + sum(len(rows) for _file, rows in self.beside)

    @property
    def parts(self) -> list[Unit]:
        """Units of one file each that have its rows, in their order."""
        rest = [
            replace(self, file=file, first=rows[0], last=rows[-1], rows=rows, beside=())
            for file, rows in self.beside
        ]
        return [replace(self, beside=()), *rest]


# The end of such a key: FIRST-LAST, a digest of chosen rows, a digest of the group's column.
_RANGE = re.compile(r"-(\d+)-(\d+)(?:-([0-9a-f]{16}))?(?:-[0-9a-f]{8})?\.parquet\Z")


#: Stages whose units over the same rows share a pass, and how many of them at most (None: all). A
#: product with a direction takes a backward pass of its own beside the pass that is shared: few of
#: them share most of that, and leave work for other replicas.
SHARED: dict[str, int | None] = {"inner_products": None, "directions": None, "hessian_products": 4}
Units = Sequence[Unit]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Units over the same rows that are computed in one pass, each with a shard of its own.

    Inner products with several targets share the forward and the backward pass, and so do several
    directions of the same rows, and some products of the Hessian with them; every other stage has
    bundles of one. Every target keeps its own shards, so that a new one costs only its own.
    """

    units: tuple[Unit, ...]

    @property
    def shards(self) -> int:
        """How many shards' worth of time one pass may take."""
        return max(unit.shards for unit in self.units)


@dataclass(frozen=True)
class ExactUnits:
    """Where exact scores come from: sketches of candidates and targets, or inner products.

    Shards of candidates may hold more rows than are wanted, and a row may be in several: they were
    made for another choice of rows. The first one in the order of the units counts.

    Attributes:
        sketches: gradient shards of candidates (projection: kronecker).
        targets: gradient shards of each target, likewise.
        products: inner products of candidates with each target's columns (projection: exact).
        wanted: the candidates' rows by the URL of their file; None for every row.
    """

    sketches: list[Unit]
    targets: dict[str, list[Unit]]
    products: dict[str, list[Unit]]
    wanted: dict[str, tuple[int, ...]] | None = None

    @property
    def all(self) -> list[Unit]:
        """Every unit, targets first: their shards are few and everything waits for them."""
        of_targets = [unit for units in self.targets.values() for unit in units]
        return [*of_targets, *self.candidates]

    @property
    def candidates(self) -> list[Unit]:
        """The candidates' units alone."""
        return [*self.sketches, *(u for us in self.products.values() for u in us)]


def bundled(units: Iterable[Unit]) -> list[Bundle]:
    """Group units of the same stage over the same rows, in order of first appearance."""
    groups: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        same = (unit.stage, unit.file, unit.first, unit.last, unit.rows, unit.group_by)
        alone = () if unit.stage in SHARED else (unit.fingerprint,)
        groups.setdefault((*same, *alone), []).append(unit)
    bundles = []
    for members in groups.values():
        step = SHARED.get(members[0].stage) or len(members)
        bundles += [
            Bundle(tuple(members[start : start + step])) for start in range(0, len(members), step)
        ]
    return bundles


def hash_rows(rows: Sequence[int] | np.ndarray) -> str:
    """Short digest of a sparse set of rows."""
    data = np.asarray(rows, dtype="<i8").tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def rows_are_of(key: str, rows: np.ndarray) -> bool:
    """Whether these are the rows, in order, of the unit with this key."""
    found = _RANGE.search(key)
    if found is None:
        return False
    first, last, digest = int(found[1]), int(found[2]), found[3]
    if digest is not None:
        return hash_rows(rows) == digest
    return np.array_equal(rows, np.arange(first, last + 1))


def range_units(
    stage: str,
    fingerprint: str,
    files: Iterable[SourceFile],
    rows_per_shard: int,
    needs: tuple[str, ...] = (),
    group_by: str | None = None,
) -> list[Unit]:
    """Cut every file into ranges of `rows_per_shard` rows, in file order."""
    return [
        Unit(
            stage,
            fingerprint,
            file,
            first,
            min(first + rows_per_shard, file.rows) - 1,
            group_by=group_by,
            needs=needs,
        )
        for file in files
        for first in range(0, file.rows, rows_per_shard)
    ]


def sparse_units(
    stage: str,
    fingerprint: str,
    file: SourceFile,
    rows: Sequence[int],
    rows_per_shard: int,
    needs: tuple[str, ...] = (),
) -> list[Unit]:
    """Cut chosen rows of one file into units of `rows_per_shard` rows, in row order."""
    ordered = sorted(int(row) for row in rows)
    chunks = [ordered[i : i + rows_per_shard] for i in range(0, len(ordered), rows_per_shard)]
    return [
        Unit(stage, fingerprint, file, chunk[0], chunk[-1], rows=tuple(chunk), needs=needs)
        for chunk in chunks
    ]
