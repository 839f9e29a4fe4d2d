"""DataInf in the reducer: what comes before, between and after its passes over the shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float

from influence.cache import Cache
from influence.catalogue import Catalogue
from influence.curvature_units import Query, add_up, curvature_units, write_query
from influence.datainf import LayerBlock, inverse_products
from influence.gradient_rows import gradient_rows, mean_gradients, squared_norms
from influence.layer_choice import choose_layers
from influence.predictor import linear_predictor, write_predictor
from influence.schemas import LayerChoice
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
    ) -> None:
        self._cache, self._scoring, self._unit = cache, Cache(scoring), unit
        self._pool, self._targets, self._columns = pool, targets, columns
        self._query: Query | None = None
        self._blocks: list[LayerBlock] = []
        self._products = np.empty((0, 0))

    def begin(self, exact: ExactUnits) -> list[Unit]:
        """Pass 0, and the targets' mean gradients; returns the units of pass 1.

        Raises:
            InputError: not one candidate, or a row of a target, has no usable gradient.
        """
        cache, pool, unit = self._cache, self._pool, self._unit
        squares, self._blocks = squared_norms(cache, exact.sketches, pool, unit=unit)
        targets = mean_gradients(cache, exact.targets, self._targets, self._columns, unit=unit)
        damping = squares.damping(self._blocks).numpy()
        self._query = Query(targets.astype(np.float32), damping, unit)
        key = write_query(self._scoring.url, self._query)
        size = 8 * targets.size
        return curvature_units(self._scoring.url, exact.sketches, pool.scorable, pool, key, size)

    def choose_layers(self, pilot: ExactUnits, memory: str | int) -> LayerChoice:
        """The layers to keep; see `influence.layer_choice`."""
        cache, unit = self._cache, self._unit
        targets = mean_gradients(cache, pilot.targets, self._targets, self._columns, unit=unit)
        return choose_layers(cache, pilot, self._pool, targets, memory, unit=unit)

    def predictor(self, sums: Sequence[Unit]) -> str:
        """H^-1 v of every column, from the sums of pass 1; returns the key of what scores by it.

        A score is the negated influence: higher is better.
        """
        assert self._query is not None  # begin comes first
        total, rows = add_up(self._scoring, sums)
        targets = torch.from_numpy(self._query.targets)
        damping = torch.from_numpy(self._query.damping)
        self._products = inverse_products(targets, total, rows, self._blocks, damping).numpy()
        predictor = linear_predictor(self._products, units=self._unit)
        return write_predictor(self._scoring.url, predictor)

    def halves(self, gradients: Sequence[Unit]) -> Float[np.ndarray, "2 r m"] | None:
        """Scores of some rows by either half of the layers' projections; None of whole layers.

        The rows are those of a few shards spread evenly over the pool.
        """
        found: list[np.ndarray] = []
        step = max(1, len(gradients) * gradients[0].count // NOISE_ROWS)
        for _unit, shard in read_shards(self._cache, gradients[::step]):
            rows = gradient_rows(shard, unit=self._unit)
            if rows is None:
                continue
            if shard.layout.whole:
                return None
            weights = half_weights(shard.layout)
            found.append(np.stack([(rows.vectors * w) @ self._products.T for w in weights]))
        return np.concatenate(found, axis=1) if found else None
