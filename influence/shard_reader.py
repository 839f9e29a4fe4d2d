"""Committed shards -> arrays by catalogue position: embeddings, exact scores, target gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from influence import scoring
from influence.cache import Cache, Shard
from influence.candidates import SourceFile
from influence.catalogue import Catalogue, build_catalogue
from influence.errors import InputError
from influence.target_columns import TargetColumns, mean_vectors
from influence.units import ExactUnits, Unit

READERS = 8
NO_EMBEDDING = "embedding is zero or not finite"
NO_GRADIENT = "gradient is zero or not finite"


def read_shards(cache: Cache, units: Sequence[Unit]) -> list[Shard]:
    """Read and verify the shards of these units, in their order."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda unit: cache.read(unit.key), units))


def read_catalogue(cache: Cache, units: Sequence[Unit], *, drop_duplicates: bool) -> Catalogue:
    """Put the catalogue shards of some files together."""
    files: dict[str, SourceFile] = {}
    tables: dict[str, list[pa.Table]] = {}
    for unit, shard in zip(units, read_shards(cache, units), strict=True):
        files[unit.file.url] = unit.file
        tables.setdefault(unit.file.url, []).append(shard.table)
    return build_catalogue(list(files.values()), tables, drop_duplicates=drop_duplicates)


def read_embeddings(
    cache: Cache, units: Sequence[Unit], catalogue: Catalogue
) -> Float[np.ndarray, "n e"]:
    """Unit embeddings by catalogue position, float32; rows without a usable one are NaN.

    Raises:
        InputError: not one row has an embedding.
    """
    whole: np.ndarray | None = None
    for unit, shard in zip(units, read_shards(cache, units), strict=True):
        usable = scoring.usable_norm(shard.floats("norm"))
        if not usable.any():
            continue
        vectors = shard.vectors()[usable]
        if whole is None:
            whole = np.full((len(catalogue), vectors.shape[1]), np.nan, dtype=np.float32)
        rows = shard.table.column("row").to_numpy()
        whole[catalogue.positions(unit.file, rows[usable])] = vectors
    if whole is None:
        raise InputError(f"not one row could be embedded; reasons: {catalogue.reasons()}")
    return whole


def exclude_unembedded(catalogue: Catalogue, embeddings: Float[np.ndarray, "n e"]) -> None:
    """Give rows without a usable embedding their reason in the catalogue."""
    missing = ~np.isfinite(embeddings).all(axis=1)
    catalogue.exclude(np.flatnonzero(missing).tolist(), NO_EMBEDDING)


def read_exact_scores(
    cache: Cache,
    exact: ExactUnits,
    pool: Catalogue,
    targets: Mapping[str, Catalogue],
    columns: TargetColumns,
    normalize: bool,
) -> tuple[Int[np.ndarray, "r"], scoring.ExactScores]:
    """(positions, scores) of the rows with a usable gradient, in pool order.

    Rows without one get their reason in the catalogue.

    Raises:
        InputError: not one candidate, or a target row, has a usable gradient.
    """
    if exact.products:
        names = dict.fromkeys(column.target for column in columns.columns)
        positions, P = _side_by_side(
            [_read_products(cache, exact.products[name], pool, normalize) for name in names]
        )
        halves = None
    else:
        means = _target_sketches(cache, exact.targets, targets, columns, normalize)
        positions, P, halves = _read_sketches(cache, exact.sketches, pool, means, normalize)
    if not len(positions):
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
    cache: Cache, units: Sequence[Unit], pool: Catalogue, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    positions, parts = [], []
    for unit, shard in zip(units, read_shards(cache, units), strict=True):
        where, vectors, norm = _usable_rows(unit, shard, pool)
        if len(where):
            positions.append(where)
            parts.append(scoring.unit(vectors, norm, normalize))
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
    units: Sequence[Unit],
    pool: Catalogue,
    means: Float[np.ndarray, "m d"],
    normalize: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positions, halves = [], []
    for unit, shard in zip(units, read_shards(cache, units), strict=True):
        where, vectors, norm = _usable_rows(unit, shard, pool)
        if len(where):
            positions.append(where)
            halves.append(scoring.sketched_halves(vectors, norm, means, normalize))
    if not halves:
        return np.empty(0, np.int64), np.empty((0, len(means))), np.empty((2, 0, len(means)))
    both = np.concatenate(halves, axis=1)
    return np.concatenate(positions), both.mean(axis=0), both


def _usable_rows(
    unit: Unit, shard: Shard, pool: Catalogue
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, vectors, norms) of the rows with a gradient; the others get their reason."""
    norm, vectors = shard.floats("norm"), shard.vectors()
    where = pool.positions(unit.file, shard.table.column("row").to_numpy())
    # A finite norm does not make finite entries: a product can overflow where a norm does not.
    usable = scoring.usable_norm(norm) & np.isfinite(vectors).all(axis=1)
    pool.exclude(where[~usable].tolist(), NO_GRADIENT)
    return where[usable], vectors[usable], norm[usable]


def _target_sketches(
    cache: Cache,
    units: Mapping[str, Sequence[Unit]],
    targets: Mapping[str, Catalogue],
    columns: TargetColumns,
    normalize: bool,
) -> Float[np.ndarray, "m d"]:
    """Mean sketched (unit) gradient of every column."""
    rows = {}
    for name, members in units.items():
        catalogue = targets[name]
        whole: np.ndarray | None = None
        for unit, shard in zip(members, read_shards(cache, members), strict=True):
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
    return mean_vectors(columns, rows)
