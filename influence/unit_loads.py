"""What computing a unit takes, from the catalogue: before any model runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from influence.catalogue import Catalogue
from influence.load import Load
from influence.schemas import REASON_DUPLICATE
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
