"""Committed shards -> arrays by catalogue position: embeddings, exact scores, target gradients.

Shards go by one after the other, a few being read ahead: nothing here holds the vectors of a pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from influence import scoring
from influence.cache import Cache, Shard
from influence.catalogue import Catalogue, build_catalogue
from influence.errors import InputError
from influence.schemas import VectorLayout
from influence.target_columns import TargetColumns, mean_vectors
from influence.units import ExactUnits, Unit

T = TypeVar("T")
R = TypeVar("R")

READERS = 8
NO_EMBEDDING = "embedding is zero or not finite"
NO_GRADIENT = "gradient is zero or not finite"


def read_shards(cache: Cache, units: Sequence[Unit]) -> Iterator[tuple[Unit, Shard]]:
    """Read and verify the shards of these units, in their order; at most READERS are held ahead."""
    return read_ahead(units, lambda unit: cache.read(unit.key))


def read_ahead(items: Iterable[T], read: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """(item, what `read` makes of it), in order; at most READERS results are held ahead."""
    with ThreadPoolExecutor(READERS) as readers:
        ahead: deque = deque()
        for item in items:
            if len(ahead) == READERS:
                first, shard = ahead.popleft()
                yield first, shard.result()
                del shard  # or the consumer's shard would live on beside the next ones
            ahead.append((item, readers.submit(read, item)))
        while ahead:
            first, shard = ahead.popleft()
            yield first, shard.result()
            del shard


def read_catalogue(cache: Cache, units: Sequence[Unit], *, drop_duplicates: bool) -> Catalogue:
    """Put the catalogue shards of some files together."""
    files = list({unit.file.url: unit.file for unit in units}.values())
    parts = ((unit.file, shard.table) for unit, shard in read_shards(cache, units))
    return build_catalogue(files, parts, drop_duplicates=drop_duplicates)


def usable_embeddings(
    shard: Shard, *, lengths: bool, units: bool = False
) -> tuple[Bool[np.ndarray, " b"], np.ndarray | None]:
    """(which rows have a usable embedding, those rows' embeddings, or None where there is none).

    Unit rows as they were stored, or with `lengths` as they were before, in float32. Of gradients,
    which are stored with their lengths, `units` makes unit rows.
    """
    norm = shard.floats("norm")
    usable = scoring.usable_norm(norm)
    if not usable.any():
        return usable, None  # its vectors have no width
    vectors = shard.vectors()
    usable &= _finite_rows(vectors)
    kept = vectors.copy() if usable.all() else vectors[usable]
    if lengths:
        kept = kept.astype(np.float32) * norm[usable, None].astype(np.float32)
    if units:
        kept = kept / norm[usable, None].astype(kept.dtype)
    return usable, kept


def _finite_rows(vectors: Float[np.ndarray, "b e"]) -> Bool[np.ndarray, " b"]:
    """Which rows have finite numbers only."""
    if vectors.dtype == np.float16:
        # An exponent of ones: numpy would make a float32 of every number first.
        bits = vectors.view(np.uint16) & 0x7FFF
        return np.asarray(bits.max(axis=1, initial=0) < 0x7C00)
    return np.asarray(np.isfinite(vectors).all(axis=1))


def embedding_blocks(
    cache: Cache, units: Sequence[Unit], catalogue: Catalogue, *, lengths: bool = False
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b e"]]]:
    """(positions, float32 embeddings) of every shard's rows with a usable one, shard by shard.

    Unit rows, or with `lengths` the embeddings as they were before they were brought to length 1.
    A shard without a usable row is passed over. Rows that are duplicates are there, too.
    """
    for unit, shard in read_shards(cache, units):
        usable, kept = usable_embeddings(shard, lengths=lengths)
        if kept is None:
            continue
        rows = shard.table.column("row").to_numpy()[usable]
        yield catalogue.positions(unit.file, rows), kept.astype(np.float32)


def read_embeddings(
    cache: Cache,
    units: Sequence[Unit],
    catalogue: Catalogue,
    positions: Int[np.ndarray, " r"],
    *,
    lengths: bool = False,
) -> Float[np.ndarray, "r e"]:
    """Embeddings of a few rows (see `embedding_blocks`), float32; NaN for one without.

    Only the shards that hold one of the rows are read.

    Raises:
        InputError: not one of the rows has an embedding.
    """
    slot = np.full(len(catalogue), -1)
    slot[positions] = np.arange(len(positions))
    holding = [
        unit
        for unit in units
        if (slot[catalogue.positions(unit.file, range(unit.first, unit.last + 1))] >= 0).any()
    ]
    found: np.ndarray | None = None
    for where, vectors in embedding_blocks(cache, holding, catalogue, lengths=lengths):
        if found is None:
            found = np.full((len(positions), vectors.shape[1]), np.nan, dtype=np.float32)
        wanted = slot[where] >= 0
        found[slot[where[wanted]]] = vectors[wanted]
    if found is None or not np.isfinite(found).all(axis=1).any():
        raise InputError(
            f"not one of {len(positions)} rows could be embedded (zero or not finite); reasons of "
            f"rows without a score: {catalogue.reasons()}"
        )
    return found


def read_exact_scores(
    cache: Cache,
    exact: ExactUnits,
    pool: Catalogue,
    targets: Mapping[str, Catalogue],
    columns: TargetColumns,
    normalize: bool,
    *,
    needed: bool = True,
    further: Float[np.ndarray, "e d"] | None = None,
) -> tuple[Int[np.ndarray, "r"], scoring.ExactScores]:
    """(positions, scores) of the rows with a usable gradient that can be scored, in pool order.

    Rows without one get their reason in the catalogue. Of a row that several shards hold, the
    first one counts. `needed`: there has to be one. `further`: vectors beside the targets' means
    that sketches are multiplied with; their columns follow those of the targets.

    Raises:
        InputError: not one candidate (if needed), or a target row, has a usable gradient.
    """
    if exact.products:
        names = dict.fromkeys(column.target for column in columns.columns)
        positions, P = _side_by_side(
            [
                _read_products(cache, exact.products[name], pool, exact.wanted, normalize)
                for name in names
            ]
        )
        halves = None
    else:
        rows = read_target_rows(cache, exact.targets, targets, normalize)
        means = mean_vectors(columns, rows)
        if further is not None:
            means = np.concatenate([means, further])
        positions, P, halves = _read_sketches(cache, exact, pool, means, normalize)
    # A row may be a duplicate of one in another shard; it is scored through that one.
    kept = np.isin(positions, pool.eligible)
    positions, P = positions[kept], P[kept]
    halves = None if halves is None else halves[:, kept]
    if needed and not len(positions):
        raise InputError(f"not one candidate has a usable gradient; reasons: {pool.reasons()}")
    order = np.argsort(positions, kind="stable")
    sorted_halves = None if halves is None else halves[:, order]
    return positions[order], scoring.ExactScores(P[order], sorted_halves)


def check_target_rows(name: str, catalogue: Catalogue, rows: Float[np.ndarray, "t d"]) -> None:
    """A target row that could be tokenised must also have a vector.

    Raises:
        InputError: names the row.
    """
    usable = np.atleast_1d(np.isfinite(rows).all(axis=1))
    for position in catalogue.eligible:
        if not usable[position]:
            raise InputError(
                f"targets.{name}: row {catalogue.ids[position]} has a zero or non-finite "
                "gradient or embedding; remove it from the target (it cannot steer anything)"
            )


def _read_products(
    cache: Cache,
    units: Sequence[Unit],
    pool: Catalogue,
    wanted: Mapping[str, Sequence[int]] | None,
    normalize: bool,
) -> tuple[np.ndarray, np.ndarray]:
    positions, parts = [], []
    for where, kept, vectors, norm, _layout in _usable_rows(cache, units, pool, wanted):
        positions.append(where)
        parts.append(scoring.unit(vectors, norm, normalize)[kept])
    if not parts:
        return np.empty(0, np.int64), np.empty((0, 0))
    return np.concatenate(positions), np.concatenate(parts)


def _side_by_side(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of several targets, of the rows that have a usable gradient in every target's shards.

    Shards of different targets can come from different runs, so a row may be usable in one only.
    """
    positions = reduce(np.intersect1d, [where for where, _ in parts])
    rows = []
    for where, scores in parts:
        order = np.argsort(where)
        rows.append(scores[order[np.searchsorted(where[order], positions)]])
    return positions, np.concatenate(rows, axis=1)


def _read_sketches(
    cache: Cache,
    exact: ExactUnits,
    pool: Catalogue,
    means: Float[np.ndarray, "m d"],
    normalize: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positions, halves = [], []
    for where, kept, vectors, norm, layout in _usable_rows(
        cache, exact.sketches, pool, exact.wanted
    ):
        positions.append(where)
        of_shard = scoring.sketched_halves(vectors, norm, means, normalize, layout=layout)
        halves.append(of_shard[:, kept])
    if not halves:
        return np.empty(0, np.int64), np.empty((0, len(means))), np.empty((2, 0, len(means)))
    both = np.concatenate(halves, axis=1)
    return np.concatenate(positions), both.mean(axis=0), both


def _usable_rows(
    cache: Cache,
    units: Sequence[Unit],
    pool: Catalogue,
    wanted: Mapping[str, Sequence[int]] | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, VectorLayout]]:
    """(positions, kept, vectors, norms, the vectors' layout), shard by shard.

    Vectors and norms are of all rows with a gradient, `kept` (a mask over them) are the wanted ones
    that no shard before held: so a score's last bits depend on its shard, not on what is wanted of
    it. `positions` are the kept ones'. Wanted rows without a gradient get their reason.
    """
    left = np.full(len(pool), wanted is None)
    if wanted is not None:
        files = {file.url: file for file in pool.files}
        for url, rows in wanted.items():
            left[pool.positions(files[url], rows)] = True
    for unit, shard in read_shards(cache, units):
        where = pool.positions(unit.file, shard.table.column("row").to_numpy())
        new = left[where]
        left[where] = False
        norm, vectors = shard.floats("norm"), shard.vectors()
        # A finite norm does not make finite entries: a product can overflow where a norm does not.
        usable = scoring.usable_norm(norm) & np.isfinite(vectors).all(axis=1)
        pool.exclude(where[new & ~usable].tolist(), NO_GRADIENT)
        if (new & usable).any():
            yield where[new & usable], new[usable], vectors[usable], norm[usable], shard.layout


def read_target_rows(
    cache: Cache,
    units: Mapping[str, Sequence[Unit]],
    targets: Mapping[str, Catalogue],
    normalize: bool,
) -> dict[str, Float[np.ndarray, "t d"]]:
    """Sketched (unit) gradients of every target's rows by catalogue position.

    Raises:
        InputError: a target row that can be scored has no usable gradient.
    """
    rows = {}
    for name, members in units.items():
        catalogue = targets[name]
        whole: np.ndarray | None = None
        for unit, shard in read_shards(cache, members):
            norm = shard.floats("norm")
            usable = scoring.usable_norm(norm)
            if not usable.any():
                continue
            vectors = shard.vectors()[usable]
            if whole is None:
                whole = np.full((len(catalogue), vectors.shape[1]), np.nan)
            row = shard.table.column("row").to_numpy()[usable]
            where = catalogue.positions(unit.file, row)
            whole[where] = scoring.unit(vectors, norm[usable], normalize)
        if whole is None:
            raise InputError(f"targets.{name}: not one row has a usable gradient")
        check_target_rows(name, catalogue, whole)
        rows[name] = whole
    return rows


def read_sketches(
    cache: Cache, exact: ExactUnits, pool: Catalogue, positions: Int[np.ndarray, " r"]
) -> Float[np.ndarray, "r d"]:
    """Projected (or whole) gradients of a few candidates, not normalised, in this order."""
    found: np.ndarray | None = None
    slot = np.full(len(pool), -1)
    slot[positions] = np.arange(len(positions))
    for where, kept, vectors, _norm, _layout in _usable_rows(
        cache, exact.sketches, pool, exact.wanted
    ):
        if found is None:
            found = np.zeros((len(positions), vectors.shape[1]), dtype=vectors.dtype)
        wanted = slot[where] >= 0
        found[slot[where[wanted]]] = vectors[kept][wanted]
    if found is None:
        raise InputError(f"not one candidate has a usable gradient; reasons: {pool.reasons()}")
    return found
