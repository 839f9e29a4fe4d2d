"""Columns of the score matrix, and what becomes of them per target and group."""

from __future__ import annotations

import numpy as np
import pytest
from shard_tables import one_catalogue, source_file

from influence.errors import InputError
from influence.selection import combined_score
from influence.target_columns import mean_vectors, target_columns

ROWS = source_file("t/rows.jsonl", 3)
GROUP = source_file("t/group.jsonl", 4)
TASKS = source_file("t/tasks.jsonl", 5)


def _mixed():
    """A target per row, one as a group, one by task; in each a row that cannot be scored."""
    catalogues = {
        "rows": one_catalogue((ROWS, {"id": ["r0", "r1", None], "reason": [None, "bad", None]})),
        "group": one_catalogue((GROUP, {"reason": ["bad", None, None, None]})),
        "tasks": one_catalogue(
            (TASKS, {"group": ["z", "a", "z", "a", "z"], "reason": [None] * 4 + ["bad"]})
        ),
    }
    per = {"rows": "row", "group": "group", "tasks": "group"}
    return target_columns(catalogues, per, {"rows": False, "group": False, "tasks": True})


def test_columns_are_rows_groups_or_the_whole_target():
    columns = _mixed()
    assert [(c.target, c.label, c.rows) for c in columns.columns] == [
        ("rows", "rows:r0", (0,)),
        ("rows", "rows:rows.jsonl:2", (2,)),
        ("group", "group", (1, 2, 3)),
        ("tasks", "tasks/a", (1, 3)),
        ("tasks", "tasks/z", (0, 2)),
    ]
    assert columns.names == ("rows", "group", "tasks", "tasks/a", "tasks/z")
    assert columns.target_of.tolist() == [0, 0, 1, 2, 2]


def test_named_scores_are_means_over_a_names_columns():
    columns = _mixed()
    P = np.random.default_rng(0).normal(size=(7, 5))
    named = P @ columns.named()
    for i in range(7):
        a, b, c, d, e = P[i]
        expected = [(a + b) / 2, c, (d + e) / 2, d, e]
        np.testing.assert_allclose(named[i], expected, rtol=1e-14, atol=1e-15)
    mean, _ = combined_score(P, columns.target_of, "mean")
    np.testing.assert_allclose(named[:, :3].mean(axis=1), mean, rtol=1e-13, atol=1e-15)


def test_mean_vectors_are_means_over_a_columns_rows():
    columns = _mixed()
    rng = np.random.default_rng(1)
    rows = {name: rng.normal(size=(n, 3)) for name, n in (("rows", 3), ("group", 4), ("tasks", 5))}
    rows["group"][0] = rows["rows"][1] = rows["tasks"][4] = np.nan  # those that have a reason
    means = mean_vectors(columns, rows)
    for column, mean in zip(columns.columns, means, strict=True):
        total = np.zeros(3)
        for row in column.rows:
            total += rows[column.target][row]
        np.testing.assert_allclose(mean, total / len(column.rows), rtol=1e-14)


def test_a_group_without_a_name_is_a_group():
    catalogue = one_catalogue((ROWS, {"group": ["", None, "a"]}))
    columns = target_columns({"t": catalogue}, {"t": "group"}, {"t": True})
    assert [(c.label, c.rows) for c in columns.columns] == [("t/(none)", (0, 1)), ("t/a", (2,))]


def test_targets_whose_names_begin_alike_are_kept_apart():
    catalogues = {name: one_catalogue((ROWS, {"group": ["b"] * 3})) for name in ("a", "ab", "b")}
    per = dict.fromkeys(catalogues, "group")
    columns = target_columns(catalogues, per, {"a": True, "ab": False, "b": False})
    assert columns.names == ("a", "a/b", "ab", "b")
    np.testing.assert_array_equal(columns.named(), [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_a_target_without_a_usable_row_is_named_with_the_reasons():
    catalogue = one_catalogue((ROWS, {"reason": ["no assistant turn", "bad", "bad"]}))
    with pytest.raises(
        InputError, match=r"targets\.empty: none of the \d+ rows .*bad: 2, no assistant"
    ):
        target_columns({"empty": catalogue}, {"empty": "row"}, {"empty": False})
