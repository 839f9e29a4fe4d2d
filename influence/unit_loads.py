"""What computing a unit takes, from the catalogue: before any model runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from influence.catalogue import Catalogue
from influence.load import Load
from influence.schemas import REASON_DUPLICATE
from influence.training_data import drawn_rows
from influence.units import FULL_VECTORS, Unit


class UnitLoad(NamedTuple):
    """What a unit's result will say.

    rows: all of the unit's. vectors: rows of its shard with a vector. tokens: of those rows.
    load: what the model computes.
    """

    rows: int
    vectors: int
    tokens: int
    load: Load

    def plus(self, other: UnitLoad) -> UnitLoad:
        """Of both together."""
        return UnitLoad(
            self.rows + other.rows,
            self.vectors + other.vectors,
            self.tokens + other.tokens,
            self.load + other.load,
        )


def unit_load(catalogue: Catalogue, unit: Unit) -> UnitLoad:
    """Count as `influence.worker` computes: equal rows of a shard once, but not of a target."""
    where = catalogue.positions(unit.file, unit.row_numbers)
    seen = np.asarray([text in (None, REASON_DUPLICATE) for text in catalogue.reason.values])
    where = where[seen[catalogue.reason.codes[where]]]
    computed = where
    if unit.stage not in FULL_VECTORS:
        computed = where[~catalogue.digests.repeats(where)]
    tokens = int(catalogue.n_tokens[where].sum())
    return UnitLoad(unit.count, len(where), tokens, load_of(catalogue, computed))


def unit_loads(catalogues: Sequence[Catalogue], units: Sequence[Unit]) -> list[UnitLoad]:
    """What computing each unit takes, each part of it in the catalogue that has its file."""
    of = {(file.url, file.rows): catalogue for catalogue in catalogues for file in catalogue.files}
    return [
        reduce(
            UnitLoad.plus,
            (unit_load(of[part.file.url, part.file.rows], part) for part in unit.parts),
        )
        for unit in units
    ]


def training_load(pool: Catalogue, fraction: float, seed: int, max_length: int) -> Load:
    """The load of one epoch over a random part of the pool; duplicates are trained on, too."""
    trained = np.asarray([text in (None, REASON_DUPLICATE) for text in pool.reason.values])
    drawn = drawn_rows(len(pool), fraction, seed)
    return load_of(pool, drawn[trained[pool.reason.codes[drawn]]], max_length)


def load_of(
    catalogue: Catalogue, positions: Int[np.ndarray, " p"], max_length: int | None = None
) -> Load:
    """The load of some rows; with a shorter limit than the catalogue's they lose their ends."""
    tokens = catalogue.n_tokens[positions].astype(np.int64)
    responses = catalogue.n_response_tokens[positions].astype(np.int64)
    if max_length is not None:
        lost = np.maximum(0, tokens - max_length)
        tokens, responses = tokens - lost, np.maximum(0, responses - lost)
    return Load(
        len(positions),
        int(tokens.sum()),
        int(responses.sum()),
        int(tokens @ tokens),
    )
