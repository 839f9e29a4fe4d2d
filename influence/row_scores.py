"""Scores by a function of a method's own, from the catalogue and the method's shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.cache import Cache, Shard
from influence.catalogue import Catalogue
from influence.config import Config
from influence.errors import InputError
from influence.methods import Method
from influence.score_table import ArrayTable, ScoreTable
from influence.scores import Scores
from influence.shard_reader import read_shards
from influence.target_columns import TargetColumns
from influence.units import Unit


@dataclass(frozen=True)
class PoolRows:
    """What a scoring function sees: the catalogue of the pool and the targets, and its shards.

    Attributes:
        config: the run's.
        pool: the candidates; arrays of n rows in file order. Rows without a reason can be scored.
        targets: those of every target, by name.
        columns: what gets a score each: target rows, groups or targets.
    """

    config: Config
    pool: Catalogue
    targets: Mapping[str, Catalogue]
    columns: TargetColumns
    cache: Cache
    units: Sequence[Unit]

    def shards(self) -> Iterator[tuple[Int[np.ndarray, " b"], Shard]]:
        """(positions in the pool, shard) of the method's shards, one after the other."""
        for unit, shard in read_shards(self.cache, self.units):
            rows = shard.table.column("row").to_numpy()
            yield self.pool.positions(unit.file, rows), shard

    def numbers(self, name: str) -> Float[np.ndarray, " n"]:
        """A column (`loss`, `norm`) of the method's shards; NaN for rows without one."""
        found = np.full(len(self.pool), np.nan)
        for positions, shard in self.shards():
            found[positions] = shard.floats(name)
        return found


Score = Callable[[PoolRows], Float[np.ndarray, "n"] | Float[np.ndarray, "n m"]]
"""A number for every row of the pool (higher is better, not finite: no score), or one for each
column of the targets."""


def without_gradients(table: ScoreTable, pool: Catalogue) -> Scores:
    """Scores that are no predictions, of a method that takes no gradients: there are no landmarks,
    and nothing that a sketch would leave open."""
    none = np.empty(0, np.int64), np.empty((0, table.columns))
    return Scores(table, pool.scorable, *none, None, None)


def score_rows(method: Method, rows: PoolRows) -> Scores:
    """The scores of all rows by the method's function; those without one get its reason.

    Raises:
        InputError: no row has a score.
    """
    assert method.score is not None  # it is the method that asks
    values, m = np.asarray(method.score(rows), dtype=np.float64), len(rows.columns.columns)
    if values.ndim == 1:
        values = values[:, None]
    finite = np.isfinite(values).all(axis=1)
    pool = rows.pool
    pool.exclude(np.flatnonzero(pool.scorable & ~finite), method.no_score)
    if not len(pool.eligible):
        raise InputError(f"not one row could be scored; reasons: {pool.reasons()}")
    kept = np.where(pool.scorable[:, None], values, np.nan)
    # A view: a score that no target changes is held once, however many columns there are.
    return without_gradients(ArrayTable(np.broadcast_to(kept, (len(pool), m))), pool)
