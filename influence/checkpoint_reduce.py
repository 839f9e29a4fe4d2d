"""LESS in the reducer: what candidates are multiplied with at each checkpoint, and the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from influence import scoring
from influence.cache import Cache
from influence.catalogue import Catalogue
from influence.checkpoint_scores import SumTable, weighted_sum
from influence.predictor import linear_predictor, write_predictor
from influence.score_shards import run_table, scoring_url
from influence.scores import Scores
from influence.shard_reader import NO_GRADIENT, read_shards, read_target_rows
from influence.target_columns import TargetColumns, mean_vectors
from influence.units import ExactUnits, Unit

NOISE_ROWS = 1024


class CheckpointReduce:
    """One run's sums over checkpoints; memory for the targets' columns, not for the rows.

    Args:
        run: the run directory, below which the scores lie.
    """

    def __init__(
        self,
        run: str,
        cache: Cache,
        pool: Catalogue,
        targets: Mapping[str, Catalogue],
        columns: TargetColumns,
    ) -> None:
        self._cache, self._run = cache, run
        self._pool, self._targets, self._columns = pool, targets, columns
        self._means: list[Float[np.ndarray, "m d"]] = []
        self._exact: list[ExactUnits] = []

    def fit(self, exact: ExactUnits) -> str:
        """The targets' columns at the next checkpoint; returns the key of what scores by them.

        Raises:
            InputError: a target row without a usable gradient.
        """
        rows = read_target_rows(self._cache, exact.targets, self._targets, normalize=True)
        means = mean_vectors(self._columns, rows)
        self._means.append(means)
        self._exact.append(exact)
        return write_predictor(scoring_url(self._run), linear_predictor(means, units=True))

    def scores(self, units: Sequence[Sequence[Unit]], weights: Sequence[float]) -> Scores:
        """The weighted sum of the score shards of every `fit`, in their order.

        Raises:
            InputError: not one row has a score.
        """
        width = len(self._columns.columns)
        tables = [run_table(self._run, each, self._pool, width, NO_GRADIENT) for each in units]
        table, halves = SumTable(weights, tables), self._halves(weights)
        none = np.empty((0, width))
        return Scores(table, self._pool.scorable, self._pool.eligible, none, None, halves)

    def _halves(self, weights: Sequence[float]) -> Float[np.ndarray, "2 r m"]:
        """The sums by either half of the projection, of the rows of a few shards spread evenly."""
        parts = zip(weights, self._exact, self._means, strict=True)
        return weighted_sum((w, *self._halves_at(exact, means)) for w, exact, means in parts)[1]

    def _halves_at(
        self, exact: ExactUnits, means: Float[np.ndarray, "m d"]
    ) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, "2 r m"]]:
        positions, found = [np.empty(0, np.int64)], [np.empty((2, 0, len(means)))]
        step = max(1, len(exact.sketches) * exact.sketches[0].count // NOISE_ROWS)
        for unit, shard in read_shards(self._cache, exact.sketches[::step]):
            norm = shard.floats("norm")
            usable = scoring.usable_norm(norm)
            if not usable.any():
                continue  # its vectors have no width
            vectors = shard.vectors()
            usable &= np.isfinite(vectors).all(axis=1)
            where = self._pool.positions(unit.file, shard.table.column("row").to_numpy()[usable])
            vectors, norm = vectors[usable], norm[usable]
            halves = scoring.sketched_halves(vectors, norm, means, True, layout=shard.layout)
            kept = self._pool.scorable[where]
            positions.append(where[kept])
            found.append(halves[:, kept])
        return np.concatenate(positions), np.concatenate(found, axis=1)
