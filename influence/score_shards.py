"""Scores of the pool as shards: one for every embedding shard, made where there is a replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from influence import storage
from influence.cache import Cache, Shard, vector_column
from influence.catalogue import Catalogue
from influence.errors import InputError
from influence.fingerprints import fingerprint
from influence.predictor import Mapper, Predictor
from influence.schemas import VectorLayout, score_shard_schema
from influence.score_table import ScoreBlock, scored_rows
from influence.shard_reader import read_shards, usable_embeddings
from influence.units import Unit


def scoring_url(run: str) -> str:
    """Where the score shards of a run lie, and the predictors that make them.

    They belong to one regression of one run: an interrupted run finds them there, and a run that is
    done has no use for them. So they are not in the cache.
    """
    return storage.join(run, "scoring")


def remove_scoring(run: str) -> None:
    """Remove the score shards of a run that is done, or that is to be made anew."""
    storage.delete_all(scoring_url(run))


def score_units(embedding: Sequence[Unit], predictor: str) -> list[Unit]:
    """One unit for each embedding unit, by the predictor of this key."""
    digest = fingerprint({"embedding": embedding[0].fingerprint, "predictor": predictor}).hex
    return [
        Unit("scores", digest, unit.file, unit.first, unit.last, needs=(predictor, unit.key))
        for unit in embedding
    ]


def score_table_of(shard: Shard, predictor: Predictor, mapper: Mapper) -> pa.Table:
    """The rows of a score shard: scores and variance side by side; null without an embedding."""
    usable, X = usable_embeddings(shard, lengths=predictor.lengths, units=predictor.units)
    values = np.zeros((len(usable), predictor.columns + 1))
    if X is not None:
        predicted = mapper(X)
        values[usable, :-1], values[usable, -1] = predicted.P, predicted.variance
    layout = VectorLayout(dtype="float64", dim=values.shape[1])
    rows = shard.table.column("row").combine_chunks()
    return pa.Table.from_arrays(
        [rows, vector_column(values, ~usable)], schema=score_shard_schema(layout)
    )


@dataclass(frozen=True)
class ShardTable:
    """The committed score shards of a pool as a table; rows that are not `eligible` have no score.

    Shards go by one after the other, a few being read ahead.
    """

    cache: Cache
    units: Sequence[Unit]
    catalogue: Catalogue
    eligible: Bool[np.ndarray, " n"]
    columns: int

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return len(self.eligible)

    def blocks(self) -> Iterator[ScoreBlock]:
        """One block a shard."""
        for unit, shard in read_shards(self.cache, self.units):
            values = shard.vectors()
            positions = self.catalogue.positions(unit.file, shard.table.column("row").to_numpy())
            kept = self.eligible[positions] & np.isfinite(values[:, 0])
            yield ScoreBlock(positions[kept], values[kept, :-1], values[kept, -1])


def run_table(
    run: str, units: Sequence[Unit], pool: Catalogue, columns: int, reason: str
) -> ShardTable:
    """The score shards of a run; rows that they have no score of are excluded, for this reason.

    Raises:
        InputError: not one row has a score.
    """
    table = ShardTable(Cache(scoring_url(run)), units, pool, pool.scorable, columns)
    missing = pool.scorable & ~scored_rows(table)
    if missing.any():
        pool.exclude(np.flatnonzero(missing).tolist(), reason)
        if not len(pool.eligible):
            raise InputError(f"not one row could be scored; reasons: {pool.reasons()}")
    return table
