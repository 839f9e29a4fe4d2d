"""AUC and recall of a class among ranked rows: against pairs, permutations and scikit-learn."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from influence.class_detection import area_under_curve, mean_error, recall_of_class


def ranked(seed: int, rows: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores out of so few values that they tie, and which rows are of the class (never all)."""
    rng = np.random.default_rng(seed)
    own = rng.random(rows) < 0.4
    own[:2] = True, False
    return rng.integers(values, size=rows).astype(np.float64), own


@pytest.mark.parametrize("values", [1, 2, 4, 10**6])
def test_auc_is_the_share_of_pairs_in_order_ties_counted_half(values: int) -> None:
    for seed in range(20):
        scores, own = ranked(seed, 30, values)
        pairs = [
            1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[own] for b in scores[~own]
        ]
        found = area_under_curve(scores, own)
        assert found == pytest.approx(np.mean(pairs), abs=1e-12)
        assert found == pytest.approx(roc_auc_score(own, scores), abs=1e-12)


@pytest.mark.parametrize("values", [1, 2, 3, 10**6])
def test_recall_is_its_mean_over_all_ways_to_break_ties(values: int) -> None:
    for seed in range(8):
        scores, own = ranked(seed, 6, values)
        size = int(own.sum())
        found = []
        for order in permutations(range(len(scores))):
            first = sorted(order, key=lambda row: -scores[row])[:size]  # a stable sort
            found.append(own[first].mean())
        assert recall_of_class(scores, own) == pytest.approx(np.mean(found), abs=1e-12)


def test_the_extremes() -> None:
    own = np.array([True, False, True, False, False])
    first = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (area_under_curve(first, own), recall_of_class(first, own)) == (1.0, 1.0)
    assert (area_under_curve(-first, own), recall_of_class(-first, own)) == (0.0, 0.0)
    same = np.zeros(5)
    assert (area_under_curve(same, own), recall_of_class(same, own)) == (0.5, 2 / 5)


def test_what_is_not_defined_is_refused() -> None:
    scores = np.arange(3.0)
    for own in (np.zeros(3, bool), np.ones(3, bool)):
        with pytest.raises(ValueError, match="AUC"):
            area_under_curve(scores, own)
    with pytest.raises(ValueError, match="recall"):
        recall_of_class(scores, np.zeros(3, bool))


def test_the_error_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (4000, 25))
    found = [mean_error(row) for row in samples]
    spread = np.std([each.mean for each in found])
    assert spread == pytest.approx(2.0 / 5, rel=0.05)
    errors = [each.error for each in found if each.error is not None]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.05)
    assert mean_error([0.25]) == (0.25, None)
