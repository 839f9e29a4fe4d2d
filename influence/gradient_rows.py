"""Gradient shards with their layers apart -> rows, norms by layer, targets' mean gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from influence.cache import Cache, Shard, fixed_width
from influence.catalogue import Catalogue
from influence.datainf import LayerBlock, SquaredNorms
from influence.errors import InputError
from influence.schemas import VectorLayout, layout_of
from influence.scoring import usable_norm
from influence.shard_reader import read_ahead, read_shards
from influence.target_columns import TargetColumns
from influence.units import Unit

TOKENS = "n_response_tokens"


class GradientRows(NamedTuple):
    """The rows of a shard that have a usable gradient.

    usable: which of the shard's rows they are.
    vectors: their gradients as they are stored, or scaled.
    norms: the norms of every layer of them.
    """

    usable: Bool[np.ndarray, " n"]
    vectors: Float[np.ndarray, "b d"]
    norms: Float[np.ndarray, "b layers"]


def layer_blocks(layout: VectorLayout) -> list[LayerBlock]:
    """The layers of a shard's vectors.

    Raises:
        InputError: the vectors do not keep layers apart.
    """
    if not layout.sizes:
        raise InputError(
            "a gradient shard does not keep layers apart; expected gradients.projection: layerwise "
            "or none"
        )
    return [
        LayerBlock(*block, size) for block, size in zip(layout.blocks, layout.sizes, strict=True)
    ]


def gradient_rows(shard: Shard, *, unit: bool, exponent: float = 0.0) -> GradientRows | None:
    """The usable rows of a shard, or None if there are none.

    unit: divided by their norms. exponent: else times this power of their response tokens; 1 and
    1/2 make of the gradients of `mean` those of `sum` and `sqrt`.
    """
    norm = shard.floats("norm")
    usable = usable_norm(norm)
    if not usable.any():
        return None  # without any its vectors have no width
    vectors, norms = shard.vectors(), fixed_width(shard.table, "norms", np.float32)
    # A finite norm does not make finite entries: a product can overflow where a norm does not.
    usable &= np.isfinite(vectors).all(axis=1)
    vectors, norms = vectors[usable], norms[usable].astype(np.float64)
    norm, tokens = norm[usable], shard.floats(TOKENS)[usable]
    vectors, norms = (_scaled(each, norm, tokens, unit, exponent) for each in (vectors, norms))
    return GradientRows(usable, vectors, norms)


def _scaled(
    rows: Float[np.ndarray, "b k"],
    norm: Float[np.ndarray, " b"],
    tokens: Float[np.ndarray, " b"],
    unit: bool,
    exponent: float,
) -> Float[np.ndarray, "b k"]:
    if unit:
        return rows / norm[:, None].astype(rows.dtype)
    return rows * (tokens[:, None] ** exponent).astype(rows.dtype) if exponent else rows


def norm_blocks(
    cache: Cache, units: Sequence[Unit], *, unit: bool, exponent: float = 0.0
) -> Iterator[tuple[Unit, np.ndarray, np.ndarray, VectorLayout]]:
    """(unit, rows of its file, their norms by layer, layout) of the rows with a usable norm.

    Reads the columns of norms alone.
    """
    columns = ("row", "norm", "norms", *([TOKENS] if exponent else []))
    for each, table in read_ahead(units, lambda unit: cache.read_columns(unit.key, columns)):
        if "norms" not in table.column_names:
            continue  # not one of its rows has a gradient
        norm = table.column("norm").to_numpy(zero_copy_only=False).astype(np.float64)
        usable = usable_norm(norm)
        norms = fixed_width(table, "norms", np.float32)[usable].astype(np.float64)
        tokens = table.column(TOKENS).to_numpy()[usable] if exponent else norm[usable]
        norms = _scaled(norms, norm[usable], tokens, unit, exponent)
        yield each, table.column("row").to_numpy()[usable], norms, layout_of(table.schema)


def squared_norms(
    cache: Cache,
    units: Sequence[Unit],
    pool: Catalogue,
    *,
    unit: bool,
    exponent: float = 0.0,
) -> tuple[SquaredNorms, list[LayerBlock]]:
    """DataInf's pass 0 over the candidates that count.

    Raises:
        InputError: not one of them has a usable gradient.
    """
    sums: SquaredNorms | None = None
    blocks: list[LayerBlock] = []
    for each, rows, norms, layout in norm_blocks(cache, units, unit=unit, exponent=exponent):
        if sums is None:
            blocks = layer_blocks(layout)
            sums = SquaredNorms(len(blocks))
        counted = pool.scorable[pool.positions(each.file, rows.tolist())]
        sums.add(torch.from_numpy(norms[counted]))
    if sums is None or not sums.rows:
        raise InputError(f"not one candidate has a usable gradient; reasons: {pool.reasons()}")
    return sums, blocks


def mean_gradients(
    cache: Cache,
    units: Mapping[str, Sequence[Unit]],
    targets: Mapping[str, Catalogue],
    columns: TargetColumns,
    *,
    unit: bool,
    exponent: float = 0.0,
) -> Float[np.ndarray, "m d"]:
    """The mean gradient of every column's rows, in float64; a shard at a time.

    Raises:
        InputError: a row of a target has no usable gradient.
    """
    found: np.ndarray | None = None
    for name, members in units.items():
        catalogue = targets[name]
        column_of = np.full(len(catalogue), -1)
        for index, column in enumerate(columns.columns):
            if column.target == name:
                column_of[list(column.rows)] = index
        missing = column_of >= 0
        for each, shard in read_shards(cache, members):
            rows = gradient_rows(shard, unit=unit, exponent=exponent)
            if rows is None:
                continue
            if found is None:
                found = np.zeros((len(columns.columns), rows.vectors.shape[1]))
            numbers = shard.table.column("row").to_numpy()[rows.usable]
            for position, vector in zip(
                catalogue.positions(each.file, numbers), rows.vectors, strict=True
            ):
                if column_of[position] >= 0:
                    found[column_of[position]] += vector
                    missing[position] = False
        if missing.any():
            row = catalogue.ids[int(np.flatnonzero(missing)[0])]
            raise InputError(
                f"targets.{name}: row {row} has a zero or non-finite gradient; remove it from the "
                "target (it cannot steer anything)"
            )
    assert found is not None  # every target has a row
    return found / np.asarray([[len(column.rows)] for column in columns.columns])
