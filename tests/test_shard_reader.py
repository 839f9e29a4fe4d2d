"""Shards to arrays: every number under the row and the column it belongs to."""

from __future__ import annotations

import time
import weakref

import numpy as np
import pytest
from shard_tables import commit, one_catalogue, row_table, source_file

from influence.cache import Cache
from influence.errors import InputError
from influence.shard_reader import (
    NO_GRADIENT,
    READERS,
    embedding_blocks,
    read_catalogue,
    read_embeddings,
    read_exact_scores,
    read_shards,
)
from influence.target_columns import target_columns
from influence.units import ExactUnits, Unit, range_units, sparse_units

A, B = source_file("pool/a.jsonl", 6), source_file("pool/b.jsonl", 4)
TARGET, OTHER = source_file("t/target.jsonl", 2), source_file("t/other.jsonl", 3)
WIDTH = {"target": 2, "other": 1}


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(str(tmp_path))


def _pool():
    reason = [None, "bad", None, None, None, None]
    return one_catalogue((A, {"reason": reason}), (B, {}))


def _targets():
    catalogues = {"target": one_catalogue((TARGET, {})), "other": one_catalogue((OTHER, {}))}
    per = {"target": "row", "other": "group"}
    return catalogues, target_columns(catalogues, per, dict.fromkeys(per, False))


def _gradients(rows: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def _commit_rows(cache: Cache, stage: str, name: str, values: np.ndarray, norm: list) -> list[Unit]:
    """Shards of all ten pool rows, in units of four rows; `norm` None makes a null."""
    units = range_units(stage, name * 8, [A, B], 4)
    start = 0
    for unit in units:
        stop = start + unit.count
        commit(cache, unit, values[start:stop], norm[start:stop])
        start = stop
    return units


def _products(cache: Cache, values: dict[str, np.ndarray], norms: dict[str, list]) -> ExactUnits:
    units = {
        name: _commit_rows(cache, "inner_products", name, values[name], norms[name])
        for name in values
    }
    return ExactUnits([], {}, units)


NORM = [2.0, None, 0.5, 1.0, 4.0, 1.5, 3.0, 0.25, 1.0, 2.0]


@pytest.mark.parametrize("normalize", [True, False])
def test_products_of_several_targets_stand_side_by_side_in_column_order(cache, normalize):
    catalogues, columns = _targets()
    values = {"target": _gradients(10, 2, 0), "other": _gradients(10, 1, 1)}
    exact = _products(cache, values, {"target": NORM, "other": NORM})
    # The order in which targets were computed is not the order of the columns.
    exact = ExactUnits([], {}, dict(reversed(exact.products.items())))
    pool = _pool()
    positions, scores = read_exact_scores(cache, exact, pool, catalogues, columns, normalize)
    assert positions.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert scores.halves is None
    for position, row in zip(positions, scores.P, strict=True):
        norm = NORM[position]
        assert norm is not None
        scale = norm if normalize else 1.0
        expected = [*values["target"][position] / scale, values["other"][position, 0] / scale]
        np.testing.assert_allclose(row, expected, rtol=1e-6, err_msg="a column of another target")
    assert pool.reason[1] == "bad", "the first reason is the cause"


def test_a_row_that_is_usable_for_one_target_only_misaligns_no_other(cache):
    catalogues, columns = _targets()
    values = {"target": _gradients(10, 2, 0), "other": _gradients(10, 1, 1)}
    broken = [*NORM]
    broken[3], broken[7] = 0.0, float("nan")
    overflowing = values["other"].copy()
    overflowing[5] = np.inf
    exact = _products(cache, values | {"other": overflowing}, {"target": NORM, "other": broken})
    pool = _pool()
    positions, scores = read_exact_scores(cache, exact, pool, catalogues, columns, True)
    assert positions.tolist() == [0, 2, 4, 6, 8, 9]
    for position, row in zip(positions, scores.P, strict=True):
        expected = [*values["target"][position], values["other"][position, 0]]
        norm = NORM[position]
        np.testing.assert_allclose(row * norm, expected, rtol=1e-6, err_msg="rows were shifted")
    assert [i for i, reason in enumerate(pool.reason) if reason == NO_GRADIENT] == [3, 5, 7]
    assert not set(pool.eligible) & {1, 3, 5, 7}


def test_sparse_shards_in_any_order_come_back_in_pool_order(cache):
    catalogues, columns = _targets()
    rows = {A.url: [5, 0, 3], B.url: [2, 1]}
    products = {}
    for name, width in WIDTH.items():
        members = [
            commit(
                cache,
                unit,
                np.array([[100.0 * i + 10 * row + c for c in range(width)] for row in unit.rows]),
                [1.0] * unit.count,
            )
            for i, file in enumerate((B, A))
            for unit in sparse_units("inner_products", name * 8, file, rows[file.url], 2)
        ]
        products[name] = members
    pool = _pool()
    positions, scores = read_exact_scores(
        cache, ExactUnits([], {}, products), pool, catalogues, columns, True
    )
    assert positions.tolist() == [0, 3, 5, 7, 8]
    base = np.array([100, 130, 150, 10, 20])
    np.testing.assert_array_equal(scores.P, np.stack([base, base + 1, base], axis=1))


def _sketches(cache: Cache, norms: dict[str, list]) -> tuple[ExactUnits, dict[str, np.ndarray]]:
    dim = 6
    values = {"pool": _gradients(10, dim, 2)}
    sketches = _commit_rows(cache, "gradients", "pool", values["pool"], norms["pool"])
    targets = {}
    for seed, (name, file) in enumerate((("target", TARGET), ("other", OTHER))):
        values[name] = _gradients(file.rows, dim, 5 + seed)
        targets[name] = range_units("gradients", "pool" * 8, [file], 2)
        for unit in targets[name]:
            part = slice(unit.first, unit.last + 1)
            commit(cache, unit, values[name][part], norms[name][part])
    return ExactUnits(sketches, targets, {}), values


@pytest.mark.parametrize("normalize", [True, False])
def test_sketched_scores_are_products_with_the_mean_of_each_columns_rows(cache, normalize):
    catalogues, columns = _targets()
    norms = {"pool": NORM, "target": [2.0, 3.0], "other": [1.0, 0.5, 4.0]}
    exact, values = _sketches(cache, norms)
    positions, scores = read_exact_scores(cache, exact, _pool(), catalogues, columns, normalize)
    assert positions.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]

    def row(name: str, i: int) -> np.ndarray:
        return values[name][i].astype(np.float64) / (norms[name][i] if normalize else 1.0)

    means = [row("target", 0), row("target", 1), sum(row("other", i) for i in range(3)) / 3]
    assert scores.halves is not None
    for j, position in enumerate(positions):
        for c, mean in enumerate(means):
            v = row("pool", position)
            np.testing.assert_allclose(scores.P[j, c], v @ mean, rtol=1e-12, atol=1e-13)
            halves = [2 * v[:3] @ mean[:3], 2 * v[3:] @ mean[3:]]
            np.testing.assert_allclose(scores.halves[:, j, c], halves, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [None, 0.0, float("nan"), float("inf")])
def test_a_target_row_without_a_gradient_is_named(cache, bad):
    catalogues, columns = _targets()
    norms = {"pool": NORM, "target": [2.0, 3.0], "other": [1.0, bad, 4.0]}
    exact, _ = _sketches(cache, norms)
    with pytest.raises(InputError, match=r"targets\.other: row other\.jsonl:1 .*gradient"):
        read_exact_scores(cache, exact, _pool(), catalogues, columns, True)
    norms["other"] = [bad] * 3
    exact, _ = _sketches(Cache(cache.url + "/none"), norms)
    with pytest.raises(InputError, match=r"targets\.other: not one row"):
        read_exact_scores(Cache(cache.url + "/none"), exact, _pool(), catalogues, columns, True)


def test_a_target_row_that_has_a_reason_needs_no_gradient(cache):
    catalogues, _ = _targets()
    catalogues["other"].exclude([1], "no assistant turn")
    per = {"target": "row", "other": "group"}
    columns = target_columns(catalogues, per, dict.fromkeys(per, False))
    norms = {"pool": NORM, "target": [1.0, 1.0], "other": [1.0, None, 1.0]}
    exact, values = _sketches(cache, norms)
    positions, scores = read_exact_scores(cache, exact, _pool(), catalogues, columns, False)
    mean = (values["other"][0].astype(float) + values["other"][2]) / 2
    np.testing.assert_allclose(
        scores.P[:, 2], values["pool"][positions].astype(float) @ mean, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("kind", ["products", "sketches"])
def test_a_pool_without_a_single_gradient_is_an_error(cache, kind):
    catalogues, columns = _targets()
    none = [None] * 10
    if kind == "products":
        values = {"target": _gradients(10, 2, 0), "other": _gradients(10, 1, 1)}
        exact = _products(cache, values, {"target": none, "other": none})
    else:
        exact, _ = _sketches(cache, {"pool": none, "target": [1.0] * 2, "other": [1.0] * 3})
    with pytest.raises(InputError, match=f"not one candidate.*{NO_GRADIENT}"):
        read_exact_scores(cache, exact, _pool(), catalogues, columns, True)


def test_embeddings_stand_at_their_rows_and_the_unusable_are_nan(cache):
    values = _gradients(10, 3, 4).astype(np.float16)
    norm = [*NORM]
    norm[4], norm[8] = 0.0, float("inf")
    values[9, 1] = np.nan
    # A whole shard without a row that could be embedded has vectors of another length.
    units = _commit_rows(cache, "embedding", "e", values, norm)
    empty = units[1]
    cache_of_empty = Cache(cache.url + "/empty")
    for unit in units:
        shard = cache.read(unit.key)
        if unit is empty:
            commit(cache_of_empty, unit, np.zeros((unit.count, 1), np.float16), [None] * unit.count)
        else:
            cache_of_empty.commit(unit, shard.table, {})
    for store, missing in ((cache, {1, 4, 8, 9}), (cache_of_empty, {1, 4, 5, 8, 9})):
        pool = _pool()
        whole = read_embeddings(store, units, pool, np.arange(10))
        few = read_embeddings(store, units, pool, np.array([7, 0, 8]))
        np.testing.assert_array_equal(few, whole[[7, 0, 8]], err_msg="rows stand at other rows")
        blocks = np.full((10, 3), np.nan, np.float32)
        for where, rows in embedding_blocks(store, units, pool):
            assert np.isnan(blocks[where]).all(), "a row came twice"
            blocks[where] = rows
        np.testing.assert_array_equal(blocks, whole)
        for i in range(10):
            if i in missing:
                assert np.isnan(whole[i]).all(), "an unusable embedding was let through"
            else:
                np.testing.assert_array_equal(whole[i], values[i].astype(np.float32))
    none = [commit(cache, Unit("embedding", "n", A, 0, 5), values[:6], [None] * 6)]
    with pytest.raises(InputError, match="not one of 10 rows could be embedded"):
        read_embeddings(cache, none, _pool(), np.arange(10))


def test_embeddings_with_their_lengths_are_the_vectors_times_the_norms(cache):
    values = _gradients(10, 3, 4).astype(np.float16)
    norm = [2.0, 1.0, 0.5, 1.0, 4.0, 1.5, 3.0, 0.25, 1.0, 2.0]
    units = _commit_rows(cache, "embedding", "e", values, norm)
    found = read_embeddings(cache, units, _pool(), np.arange(10), lengths=True)
    expected = values.astype(np.float64) * np.array(norm)[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg="norms of other rows")


def test_only_shards_with_a_wanted_row_are_read(cache, monkeypatch):
    values = _gradients(10, 3, 4).astype(np.float16)
    units = _commit_rows(cache, "embedding", "e", values, [1.0] * 10)
    read: list[str] = []
    original = Cache.read
    monkeypatch.setattr(Cache, "read", lambda c, key: (read.append(key), original(c, key))[1])
    read_embeddings(cache, units, _pool(), np.array([9, 1]))
    assert sorted(read) == sorted([units[0].key, units[2].key]), "other shards were read, too"


def test_few_shards_are_held_at_once(cache, monkeypatch):
    """Memory must not grow with the number of shards: reading waits for the consumer."""
    file = source_file("pool/long.jsonl", 60)
    units = range_units("embedding", "l", [file], 1)
    for unit in units:
        commit(cache, unit, np.full((1, 2), unit.first, np.float16), [1.0])
    alive: list[weakref.ref] = []
    original = Cache.read

    def watched(self: Cache, key: str):
        shard = original(self, key)
        alive.append(weakref.ref(shard.table))
        return shard

    monkeypatch.setattr(Cache, "read", watched)
    most, order = 0, []
    for unit, shard in read_shards(cache, units):
        order.append((unit.first, float(shard.vectors()[0, 0])))
        time.sleep(0.002)  # the readers could run ahead
        most = max(most, sum(ref() is not None for ref in alive))
    assert order == [(i, float(i)) for i in range(60)], "shards under other units, or out of order"
    assert most <= READERS + 2, f"{most} shards were held at once"


@pytest.mark.parametrize("kind", ["products", "sketches"])
def test_duplicates_across_shards_are_no_exact_rows(cache, kind):
    """A row is counted once, whichever shards its copies are in: noise and counts are per row."""
    catalogues, columns = _targets()
    if kind == "products":
        values = {"target": _gradients(10, 2, 0), "other": _gradients(10, 1, 1)}
        exact = _products(cache, values, {"target": NORM, "other": NORM})
    else:
        exact, _ = _sketches(cache, {"pool": NORM, "target": [1.0] * 2, "other": [1.0] * 3})
    pool = _pool()
    pool.exclude([4, 8], "duplicate")
    positions, scores = read_exact_scores(cache, exact, pool, catalogues, columns, True)
    assert positions.tolist() == [0, 2, 3, 5, 6, 7, 9], "a duplicate is among the exact rows"
    assert len(scores.P) == 7
    assert scores.halves is None or scores.halves.shape == (2, 7, 3)


def test_wanted_rows_come_from_the_first_shard_that_holds_them(cache):
    catalogues, columns = _targets()

    def shards(name: str) -> list[Unit]:
        units = [
            Unit("inner_products", name * 8, A, 0, 4, rows=(0, 3, 4)),
            Unit("inner_products", name * 8, A, 0, 5),
            Unit("inner_products", name * 8, A, 2, 5, rows=(2, 3, 5)),
        ]
        for i, unit in enumerate(units):
            rows = unit.rows if unit.rows is not None else range(6)
            width = WIDTH[name]
            values = np.array([[100.0 * i + 10 * row + c for c in range(width)] for row in rows])
            norm: list = [None if (i, row) == (1, 5) else 1.0 for row in rows]
            commit(cache, unit, values, norm)
        return units

    products = {name: shards(name) for name in WIDTH}
    pool = _pool()
    exact = ExactUnits([], {}, products, {A.url: (0, 2, 3)})
    positions, scores = read_exact_scores(cache, exact, pool, catalogues, columns, True)
    assert positions.tolist() == [0, 2, 3], "rows that nobody asked for became exact"
    base = np.array([0, 120, 30])  # row 0 and 3 of the first shard, row 2 of the second
    np.testing.assert_array_equal(scores.P, np.stack([base, base + 1, base], axis=1))
    assert pool.reason[5] is None, "a lender's row that nobody asked for was given a reason"


def test_a_catalogue_is_read_in_the_order_of_its_units(cache):
    units = range_units("catalogue", "c" * 8, [B, A], 4)
    for unit in units:
        rows = range(unit.first, unit.last + 1)
        cache.commit(unit, row_table(rows, [f"same {row % 3}" for row in rows]), {})
    pool = read_catalogue(cache, units, drop_duplicates=True)
    assert [file.url for file in pool.files] == [B.url, A.url]
    assert pool.row.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert pool.eligible.tolist() == [0, 1, 2], "duplicates across shards and files were kept"
