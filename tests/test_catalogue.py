"""The catalogue: which rows count, and why the others do not."""

from __future__ import annotations

import numpy as np
import pytest
from shard_tables import one_catalogue, row_table, source_file

from influence.catalogue import NO_SOURCE, build_catalogue
from influence.errors import InputError

A, B, C = source_file("p/a.jsonl", 4), source_file("s3://b/p/b.parquet", 3), source_file("c", 2)
TEXTS = {A: ["one", "two", "one", "bad"], B: ["three", "two", "bad"], C: ["three", "four"]}
REASONS = {A: [None, None, None, "malformed"], B: [None] * 3, C: [None] * 2}


def _pool(drop_duplicates: bool = True):
    parts = [(f, {"texts": TEXTS[f], "reason": REASONS[f]}) for f in (A, B, C)]
    return one_catalogue(*parts, drop_duplicates=drop_duplicates)


def test_the_first_of_equal_rows_is_scored_across_files():
    pool = _pool()
    texts = [text for file in (A, B, C) for text in TEXTS[file]]
    expected = [reason for file in (A, B, C) for reason in REASONS[file]]
    for i, text in enumerate(texts):
        if any(texts[j] == text and expected[j] is None for j in range(i)):
            expected[i] = "duplicate"
    assert pool.reason == expected, "a row that cannot be scored stands for no other"
    assert [texts[i] for i in pool.eligible] == ["one", "two", "three", "bad", "four"]
    assert pool.reasons() == {"duplicate": 3, "malformed": 1}
    assert list(pool.reasons()) == ["duplicate", "malformed"], "most frequent first"
    assert len(pool.eligible) + sum(pool.reasons().values()) == len(pool) == 9


def test_targets_keep_their_duplicates():
    assert _pool(drop_duplicates=False).reasons() == {"malformed": 1}


def test_ids_default_to_file_and_row_and_sources_to_a_name():
    columns = {"id": ["x", None, "", "x"], "source": ["maths", None, "", "code"]}
    pool = one_catalogue((A, columns), (B, {}))
    assert pool.ids == ["x", "a.jsonl:1", "", "x", "b.parquet:0", "b.parquet:1", "b.parquet:2"]
    assert pool.sources[:4] == ["maths", NO_SOURCE, NO_SOURCE, "code"]
    assert pool.groups == [None] * 7


def test_default_ids_of_files_of_one_name_are_distinct():
    first, second = source_file("pool/a/x.jsonl", 4), source_file("pool/b/x.jsonl", 3)
    pool = one_catalogue((first, {}), (second, {}), (A, {}))
    assert pool.ids[3:5] == ["a/x.jsonl:3", "b/x.jsonl:0"]
    assert pool.ids[-1] == "a.jsonl:3"
    assert len(set(pool.ids)) == len(pool), "rows of different files share an id"


def test_positions_and_rows_are_inverse():
    pool = _pool()
    np.testing.assert_array_equal(pool.positions(A, [0, 3]), [0, 3])
    np.testing.assert_array_equal(pool.positions(B, [0, 2]), [4, 6])
    np.testing.assert_array_equal(pool.positions(C, [1]), [8])
    assert pool.by_file([8, 0, 5, 3]) == [(A, [0, 3]), (B, [1]), (C, [1])]
    for position in range(len(pool)):
        ((file, rows),) = pool.by_file([position])
        assert pool.positions(file, rows).tolist() == [position]


def test_a_file_in_several_shards_is_put_together_in_row_order():
    parts = [
        (A, row_table([0, 1])),
        (A, row_table([2])),
        (A, row_table([3])),
        (C, row_table([0, 1])),
    ]
    pool = build_catalogue([A, C], parts, drop_duplicates=False)
    assert pool.row.tolist() == [0, 1, 2, 3, 0, 1]
    assert pool.file.tolist() == [0, 0, 0, 0, 1, 1]
    assert pool.n_tokens.tolist() == [10, 11, 12, 13, 10, 11]
    assert pool.n_response_tokens.tolist() == [5, 6, 7, 8, 5, 6]


def test_a_reason_stands_until_the_end():
    pool = _pool()
    pool.exclude([0, 3], "zero gradient")
    assert pool.reason[0] == "zero gradient"
    assert pool.reason[3] == "malformed", "the first reason is the cause"
    assert 0 not in pool.eligible


def test_no_rows_are_an_error():
    with pytest.raises(InputError, match="no rows"):
        build_catalogue([], [], drop_duplicates=True)
