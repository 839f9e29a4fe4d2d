"""DataInf in the reducer: what comes before, between and after its passes over the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from influence.cache import Cache
from influence.catalogue import Catalogue
from influence.curvature_units import Query, add_up, curvature_units, write_query
from influence.datainf import LayerBlock, inverse_products
from influence.gradient_rows import gradient_rows, mean_gradients, squared_norms
from influence.layer_choice import choose_layers
from influence.predictor import linear_predictor, write_predictor
from influence.records import LayerChoice
from influence.scoring import half_weights
from influence.shard_reader import read_shards
from influence.target_columns import TargetColumns
from influence.units import ExactUnits, Unit

NOISE_ROWS = 1024


class InfluenceReduce:
    """One run's influences, step by step; memory for the targets' columns, not for the rows.

    Args:
        scoring: the URL for what belongs to this run alone.
        unit: whether gradients, candidates' and targets', are brought to length 1.
        exponent: else, the power of their response tokens that they are multiplied with (see
            `gradient_rows`); the scores by `predictor` are then still without a candidate's own.

    Attributes:
        query: the targets' mean gradients, and every layer's damping.
        blocks: the layers.
        products: H^-1 v of every column.
        rows: candidates behind H.
    """

    def __init__(
        self,
        cache: Cache,
        scoring: str,
        pool: Catalogue,
        targets: Mapping[str, Catalogue],
        columns: TargetColumns,
        *,
        unit: bool,
        exponent: float = 0.0,
    ) -> None:
        self._cache, self._scoring, self._unit = cache, Cache(scoring), unit
        self._pool, self._targets, self._columns = pool, targets, columns
        self._exponent = exponent
        self.query = Query(np.empty((0, 0)), np.empty(0), unit, exponent)
        self.blocks: list[LayerBlock] = []
        self.products = np.empty((0, 0))
        self.rows = 0

    def begin(self, exact: ExactUnits) -> list[Unit]:
        """Pass 0, and the targets' mean gradients; returns the units of pass 1.

        Raises:
            InputError: not one candidate, or a row of a target, has no usable gradient.
        """
        scale: dict[str, Any] = {"unit": self._unit, "exponent": self._exponent}
        squares, self.blocks = squared_norms(self._cache, exact.sketches, self._pool, **scale)
        targets = mean_gradients(self._cache, exact.targets, self._targets, self._columns, **scale)
        damping = squares.damping(self.blocks).numpy()
        self.query = Query(targets.astype(np.float32), damping, **scale)
        return self.sums_of(exact.sketches, self._pool.scorable, self.query)

    def sums_of(
        self, gradients: Sequence[Unit], counted: Bool[np.ndarray, " n"], query: Query
    ) -> list[Unit]:
        """The units that sum up the counted rows of gradient shards, as the query says."""
        url, pool = self._scoring.url, self._pool
        key = write_query(url, query)
        return curvature_units(url, gradients, counted, pool, key, 8 * query.targets.size)

    def choose_layers(self, pilot: ExactUnits, memory: str | int) -> LayerChoice:
        """The layers to keep; see `influence.layer_choice`."""
        cache, unit = self._cache, self._unit
        targets = mean_gradients(cache, pilot.targets, self._targets, self._columns, unit=unit)
        return choose_layers(cache, pilot, self._pool, targets, memory, unit=unit)

    def predictor(self, sums: Sequence[Unit]) -> str:
        """H^-1 v of every column, from the sums of pass 1; returns the key of what scores by it.

        A score is the negated influence: higher is better.
        """
        self.products, self.rows = self.solved(self.query, sums)
        predictor = linear_predictor(self.products, units=self._unit)
        return write_predictor(self._scoring.url, predictor)

    def added(self, sums: Sequence[Unit]) -> tuple[Float[torch.Tensor, "m d"], int]:
        """What such units summed up, and the rows in it."""
        return add_up(self._scoring, sums)

    def solved(self, query: Query, sums: Sequence[Unit]) -> tuple[Float[np.ndarray, "m d"], int]:
        """H^-1 of the query's targets, H being that of the rows that were summed up; and those."""
        total, rows = self.added(sums)
        targets, damping = torch.from_numpy(query.targets), torch.from_numpy(query.damping)
        return inverse_products(targets, total, rows, self.blocks, damping).numpy(), rows

    def halves(self, gradients: Sequence[Unit]) -> Float[np.ndarray, "2 r m"] | None:
        """Scores of some rows by either half of the layers' projections; None of whole layers.

        The rows are those of a few shards spread evenly over the pool.
        """
        found: list[np.ndarray] = []
        step = max(1, len(gradients) * gradients[0].count // NOISE_ROWS)
        for _unit, shard in read_shards(self._cache, gradients[::step]):
            rows = gradient_rows(shard, unit=self._unit, exponent=self._exponent)
            if rows is None:
                continue
            if shard.layout.whole:
                return None
            weights = half_weights(shard.layout)
            found.append(np.stack([(rows.vectors * w) @ self.products.T for w in weights]))
        return np.concatenate(found, axis=1) if found else None
