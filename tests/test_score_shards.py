"""Score shards against the predictor on the embeddings that they were made from."""

from __future__ import annotations

import numpy as np
import pytest
from shard_tables import commit, one_catalogue, source_file

from influence import landmarks
from influence.cache import Cache
from influence.kernels import unit_rows
from influence.predictor import Mapper, regression_predictor, write_predictor
from influence.score_shards import (
    ShardTable,
    remove_scoring,
    score_table_of,
    score_units,
    scoring_url,
)
from influence.score_table import rows_of, scored_rows
from influence.units import range_units

DRAW = np.random.default_rng(0)
FILES = [source_file("a.jsonl", 23), source_file("b.jsonl", 9)]
N = 32
X = unit_rows(DRAW.normal(size=(N, 6))).astype(np.float16)
NORM = DRAW.uniform(0.5, 2.0, N)
KNOWN = np.arange(0, N, 3)
Y = DRAW.normal(size=(len(KNOWN), 2))
MISSING = {4, 25}  # no embedding
DUPLICATE = {7}  # an embedding, but no score of its own


@pytest.mark.parametrize("rows_per_shard", [4, 10, 100])
@pytest.mark.parametrize("kernel", ["laplace", "linear"])
def test_every_row_has_the_predictors_score(tmp_path, kernel: str, rows_per_shard: int):
    lengths = kernel == "linear"
    embedded = X * NORM[:, None] if lengths else X
    model = landmarks.fit(embedded[KNOWN], Y, kernel=kernel)
    predictor = regression_predictor(model, lengths=lengths)
    run, cache = str(tmp_path / "run"), Cache(str(tmp_path / "cache"))
    scoring = Cache(scoring_url(run))
    embedding = range_units("embedding", "e", FILES, rows_per_shard)
    starts = {"a.jsonl": 0, "b.jsonl": 23}
    for unit in embedding:
        first = starts[unit.file.url] + unit.first
        rows = range(first, first + unit.count)
        norm = [None if row in MISSING else float(NORM[row]) for row in rows]
        commit(cache, unit, X[first : first + unit.count], norm)
    units = score_units(embedding, write_predictor(scoring.url, predictor))
    for unit in units:
        table = score_table_of(cache.read(unit.needs[1]), predictor, Mapper(predictor))
        scoring.commit(unit, table, {})
    pool = one_catalogue(*((file, {}) for file in FILES))
    pool.exclude(sorted(DUPLICATE), "duplicate")
    found = ShardTable(scoring, units, pool, pool.scorable, 2)
    there = np.setdiff1d(np.arange(N), sorted(MISSING | DUPLICATE))
    np.testing.assert_array_equal(np.flatnonzero(scored_rows(found)), there)
    expected = landmarks.predict(model, embedded.astype(np.float64))
    np.testing.assert_allclose(
        rows_of(found, there).P, expected[there], atol=0.01, err_msg="scores of other rows"
    )
    positions = np.concatenate([block.positions for block in found.blocks()])
    assert (np.diff(positions) > 0).all(), "blocks do not come in the order of the pool"
    remove_scoring(run)
    assert not scoring.present([unit.key for unit in units])
    assert cache.present([unit.key for unit in embedding]), "the cache is not the run's to remove"
