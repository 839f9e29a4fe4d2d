"""Compact columns of texts against lists of Python strings."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from influence.text_columns import Digests, Labels, LabelSpool, Texts, TextSpool, digest_bytes

WORDS = ["b", "a", None, "", "ä", "a", "\U0001f600", "\uffff", "b", None, "Z", "aa"]


@pytest.mark.parametrize("kind", [Texts, Labels])
@pytest.mark.parametrize("chunks", [1, 3])
def test_they_read_like_a_list(kind, chunks):
    parts = [
        WORDS[i : i + len(WORDS) // chunks] for i in range(0, len(WORDS), len(WORDS) // chunks)
    ]
    column = kind(pa.chunked_array([pa.array(part, pa.string()) for part in parts]))
    assert len(column) == len(WORDS)
    assert list(column) == WORDS
    assert column == WORDS
    assert [column[i] for i in range(len(WORDS))] == WORDS
    assert list(column[3:9]) == WORDS[3:9]
    assert column[3:9].arrow.to_pylist() == WORDS[3:9]


def test_ranks_are_pythons_order_with_ties_by_position():
    words = [word for word in WORDS if word is not None]
    order = sorted(range(len(words)), key=words.__getitem__)
    ranks = Texts(words).ranks()
    assert [int(ranks[i]) for i in order] == list(range(len(words))), (
        "bytes and code points are ordered differently, or equal texts not by position"
    )


def test_labels_change_and_are_counted():
    labels = Labels(["x", None, "y", None, "x"])
    before = labels[0:2]
    assert labels.missing.tolist() == [False, True, False, True, False]
    labels.put(np.array([1, 4]), "new")
    assert list(labels) == ["x", "new", "y", None, "new"]
    labels.put(np.array([3]), "x")
    assert labels.counts() == {"x": 2, "new": 2, "y": 1}
    assert list(labels.counts()) == ["x", "new", "y"], "not by first occurrence"
    assert labels.counts(np.array([2, 4])) == {"y": 1, "new": 1}
    assert list(before) == ["x", None], "a slice shows rows of later"


def test_digests_and_which_of_them_repeat():
    draw = np.random.default_rng(0)
    some = [draw.bytes(16) for _ in range(5)]
    column = [some[i] for i in draw.integers(0, 5, 40)]
    chunked = pa.chunked_array(
        [pa.array(column[:7], pa.binary(16)), pa.array(column[5:], pa.binary(16))[2:]]
    )
    digests = Digests(digest_bytes(chunked).reshape(-1, 16))
    assert list(digests) == column
    assert digests[11] == column[11]
    rows = np.arange(3, 40, 2)
    expected = [column[row] in [column[r] for r in rows[:i]] for i, row in enumerate(rows)]
    assert digests.repeats(rows).tolist() == expected


def test_spooled_columns_are_what_was_added_and_can_be_changed():
    chunks = [["b", "a", "b"], [], ["", "ü", "c"], ["a"]]
    texts, labels = TextSpool(), LabelSpool()
    for chunk in chunks:
        # A slice: its buffers hold more than the chunk.
        column = pa.array(["before", *chunk, "after"], pa.string())[1 : 1 + len(chunk)]
        texts.add(column)
        labels.add(pa.array([value or None for value in chunk], pa.string()))
    expected = [value for chunk in chunks for value in chunk]
    assert list(texts.texts()) == expected
    coded = labels.labels()
    assert list(coded) == [value or None for value in expected]
    assert coded.values == ["b", "a", None, "ü", "c"], "not by first occurrence"
    coded.put(np.array([0, 6]), "new")
    assert list(coded)[::6] == ["new", "new"]
    assert list(TextSpool().texts()) == []
