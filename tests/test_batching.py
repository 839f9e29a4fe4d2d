"""Batches hold every row that can be scored once, whole, and within the token budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.batching import make_batches
from influence.tokenization import Encoded


def make_row(rng: np.random.Generator, row: int, length: int, reason: str | None) -> Encoded:
    ids = rng.integers(1, 1000, length).astype(np.int32)
    mask = rng.random(length) < 0.5
    mask[0] = False
    return Encoded(row, None, None, None, b"", ids, mask, length, int(mask.sum()), False, reason)


@pytest.fixture
def encoded():
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 40, 60), 200, 40, 40]
    reasons = ["malformed json" if i % 9 == 4 else None for i in range(len(lengths))]
    return [make_row(rng, i, int(n), r) for i, (n, r) in enumerate(zip(lengths, reasons))]  # noqa: B905


def test_every_scorable_row_is_in_one_batch_with_its_own_tokens(encoded):
    batches = make_batches(encoded, 120, pad_id=7)
    placed = sorted(p for batch in batches for p in batch.positions)
    assert placed == [i for i, e in enumerate(encoded) if e.reason is None], "lost or doubled rows"
    for batch in batches:
        for b, position in enumerate(batch.positions):
            row = encoded[position]
            for t in range(batch.input_ids.shape[1]):
                inside = t < len(row.input_ids)
                token = int(row.input_ids[t]) if inside else 7
                label = token if inside and row.response_mask[t] else -100
                assert batch.input_ids[b, t] == token, f"row {position} token {t}"
                assert batch.labels[b, t] == label, f"row {position} label {t}"
            assert batch.lengths[b] == len(row.input_ids)


@pytest.mark.parametrize("budget", [1, 40, 120, 10_000])
def test_the_budget_holds_and_grouping_is_greedy(encoded, budget):
    batches = make_batches(encoded, budget)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        rows, longest = batch.input_ids.shape
        assert rows == 1 or rows * longest <= budget, "a batch exceeds the budget"
        assert longest == int(batch.lengths.max()), "padded beyond the longest row"
        if following is not None:
            assert (rows + 1) * longest > budget, "a further row would have fitted"
    lengths = [int(n) for batch in batches for n in batch.lengths]
    assert lengths == sorted(lengths, reverse=True), "not longest first"
    order = [p for batch in batches for p in batch.positions]
    assert order == sorted(order, key=lambda p: (-len(encoded[p].input_ids), p)), "unstable ties"


def test_a_batch_on_another_device_has_the_same_rows(encoded):
    batch = make_batches(encoded, 120)[0]
    moved = batch.to("meta")
    assert moved.input_ids.device == torch.device("meta")
    assert moved.labels.device == moved.lengths.device == torch.device("meta")
    assert moved.positions == batch.positions


def test_no_scorable_rows_give_no_batches_and_a_bad_budget_is_refused(encoded):
    assert make_batches([e for e in encoded if e.reason], 100) == []
    with pytest.raises(ValueError, match="token_budget"):
        make_batches(encoded, 0)
