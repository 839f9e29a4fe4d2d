"""Rows that other shards hold: what is left to compute, in whatever state the cache is."""

from __future__ import annotations

import random

import numpy as np
import pytest
from shard_tables import commit, source_file

from influence.cache import Cache
from influence.row_reuse import list_shards, reuse_rows
from influence.units import Unit, range_units, sparse_units

FILE, OTHER = source_file("pool/a.jsonl", 40), source_file("pool/b.jsonl", 40)
STAGE, PRINT = "gradients", "f" * 32


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(str(tmp_path))


def put(cache: Cache, unit: Unit) -> None:
    """A shard whose vectors say the row and the unit."""
    rows = rows_of(unit)
    commit(cache, unit, np.array([[row] for row in rows], np.float32), [1.0] * len(rows))


def rows_of(unit: Unit) -> list[int]:
    return list(unit.rows) if unit.rows is not None else list(range(unit.first, unit.last + 1))


def reuse(cache: Cache, rows: list[int], per_shard: int = 4):
    plan = sparse_units(STAGE, PRINT, FILE, rows, per_shard)
    return plan, reuse_rows(cache, plan, list_shards(cache, STAGE, PRINT), per_shard, {})


@pytest.mark.parametrize("seed", range(12))
def test_every_row_comes_from_one_place_and_nothing_is_computed_twice(cache: Cache, seed: int):
    draw = random.Random(seed)
    committed: set[int] = set()
    for _ in range(4):  # runs with other choices of rows, some of them cut short
        rows = draw.sample(range(40), draw.randint(1, 25))
        plan, found = reuse(cache, rows)
        keys = list_shards(cache, STAGE, PRINT)
        assert [unit for unit in plan if unit.key in keys] == found.own, "own shards must win"
        assert all(unit.key in keys for unit in found.lenders)
        rest = [row for unit in found.rest for row in rows_of(unit)]
        assert rest == sorted(set(rows) - committed), "computes what is there, or loses rows"
        held = {row for unit in found.units for row in rows_of(unit)}
        assert set(rows) <= held, "a wanted row is in no unit"
        own = {row for unit in found.own for row in rows_of(unit)}
        assert found.borrowed == len(set(rows) & committed - own)
        for unit in draw.sample(found.rest, draw.randint(0, len(found.rest))):
            put(cache, unit)
            committed.update(rows_of(unit))
    for unit in range_units(STAGE, PRINT, [FILE], 16):
        put(cache, unit)
    assert not reuse(cache, list(range(40)))[1].rest, "whole ranges were not found"


@pytest.mark.parametrize("seed", range(8))
def test_a_killed_run_goes_on_to_the_same_units(cache: Cache, seed: int):
    draw = random.Random(seed)
    for unit in sparse_units(STAGE, PRINT, FILE, draw.sample(range(40), 9), 4):
        put(cache, unit)
    rows = draw.sample(range(40), 27)
    first = reuse(cache, rows)[1]
    left = set(first.rest)
    while left:
        done = draw.choice(sorted(left, key=lambda unit: unit.key))
        put(cache, done)
        left.remove(done)
        again = reuse(cache, rows)[1]
        assert set(again.rest) == left, "the rest was cut in another way after a kill"
        origins = [
            {row: next(unit.key for unit in found.units if row in rows_of(unit)) for row in rows}
            for found in (first, again)
        ]
        assert origins[0] == origins[1], "a row comes from another shard after a kill"


def test_other_files_fingerprints_and_damaged_shards_lend_nothing(cache: Cache):
    for unit in sparse_units(STAGE, PRINT, OTHER, range(40), 8):
        put(cache, unit)
    for unit in sparse_units(STAGE, "e" * 32, FILE, range(40), 8):
        put(cache, unit)
    damaged, whole = sparse_units(STAGE, PRINT, FILE, range(16), 8)
    for unit in (damaged, whole):
        put(cache, unit)
    with open(cache.locate(damaged.key), "r+b") as file:
        file.truncate(100)
    found = reuse(cache, [1, 5, 9, 30])[1]
    assert [unit.key for unit in found.lenders] == [whole.key]
    assert [unit.rows for unit in found.rest] == [(1, 5, 30)]


def test_only_shards_over_wanted_rows_are_read(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    for unit in range_units(STAGE, PRINT, [FILE], 5):
        put(cache, unit)
    read: list[str] = []
    original = Cache.read
    monkeypatch.setattr(Cache, "read", lambda c, key: (read.append(key), original(c, key))[1])
    found = reuse(cache, [4, 22])[1]
    assert sorted(read) == sorted(unit.key for unit in found.lenders)
    assert [(unit.first, unit.last) for unit in found.lenders] == [(0, 4), (20, 24)]
