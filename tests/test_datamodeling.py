"""The linear datamodeling score against loops, scipy, and a truth that is exactly additive."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from influence.datamodeling import (
    Agreement,
    agreement,
    changes,
    datamodeling_score,
    draw_subsets,
    extremes,
    filled,
    left_out_weights,
    mean_rank,
    rank_correlations,
    reliability,
    subset_sums,
)

N, S = 30, 40


def spearman(a: Any, b: Any) -> float:
    """scipy's."""
    found: Any = stats.spearmanr(a, b)
    return float(found.statistic)


@pytest.fixture(scope="module")
def subsets() -> np.ndarray:
    return draw_subsets(N, S, 0.5, seed=3)


def test_subsets_have_their_size_and_every_row_its_turn() -> None:
    many = draw_subsets(50, 400, 0.3, seed=1)
    assert (many.sum(axis=1) == 15).all()
    assert abs(many.mean(axis=0) - 0.3).max() < 0.12, "some rows are preferred"
    assert len({row.tobytes() for row in many}) == 400
    assert (draw_subsets(50, 400, 0.3, seed=1) == many).all()
    assert (draw_subsets(50, 5, 0.3, seed=1) == many[:5]).all(), "more subsets change the first"
    assert (draw_subsets(50, 400, 0.3, seed=2) != many).any()
    assert draw_subsets(4, 2, 0.01, seed=0).sum(axis=1).tolist() == [1, 1]


def test_where_the_truth_is_additive_its_own_coefficients_score_one(subsets: np.ndarray) -> None:
    """The output is minus the loss: a wrong sign would give -1."""
    theta = np.random.default_rng(0).normal(size=(N, 3))
    losses = 5.0 - subset_sums(theta, subsets)
    found = datamodeling_score(theta, subsets, losses)
    assert found.value == pytest.approx(1.0)
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(1.0))
    # Subsets are of one size: an offset, a factor, and any monotone link, change no rank.
    assert datamodeling_score(7 * theta + 2, subsets, np.exp(losses)).value == pytest.approx(1.0)
    assert datamodeling_score(-theta, subsets, losses).value == pytest.approx(-1.0)


def test_it_is_the_mean_of_scipys_spearman_over_loops_of_sums(subsets: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    scores, losses = rng.normal(size=(N, 4)), rng.normal(size=(S, 4))
    losses[:6, 1] = losses[0, 1]  # ties
    expected = []
    for column in range(4):
        sums = [sum(scores[i, column] for i in range(N) if row[i]) for row in subsets]
        expected.append(spearman(sums, [-loss for loss in losses[:, column]]))
    assert datamodeling_score(scores, subsets, losses).value == pytest.approx(np.mean(expected))


def test_the_interval_is_that_of_a_loop_over_resamples() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(size=(25, 2))
    b = a + rng.normal(size=a.shape)
    found = agreement(a, b, draws=300, seed=9)
    drawn = np.random.default_rng(9).integers(0, 25, size=(300, 25))
    sample = [np.mean([spearman(a[rows, c], b[rows, c]) for c in range(2)]) for rows in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(sample, [0.025, 0.975])))


def test_four_observations_are_too_few_for_an_interval() -> None:
    a = np.arange(4.0)[:, None]
    assert agreement(a, a) == Agreement(1.0, None, None), "certain of what one of 24 orders does"


def test_the_interval_covers_the_truth() -> None:
    """Gaussian pairs of correlation 0.6: Spearman's is 6/pi asin(0.3)."""
    rng, truth, inside = np.random.default_rng(3), 6 / np.pi * np.arcsin(0.3), 0
    for trial in range(200):
        a = rng.normal(size=(60, 1))
        b = 0.6 * a + 0.8 * rng.normal(size=(60, 1))
        found = agreement(a, b, draws=300, seed=trial)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= truth <= found.high
    assert inside >= 180, f"a 95 % interval covers {inside / 2} %"


def test_constant_columns_say_nothing(subsets: np.ndarray) -> None:
    rng = np.random.default_rng(4)
    scores, losses = rng.normal(size=(N, 2)), rng.normal(size=(S, 2))
    alone = datamodeling_score(scores[:, :1], subsets, losses[:, :1])
    losses[:, 1] = 1.0
    assert np.isnan(rank_correlations(subset_sums(scores, subsets), losses)[1])
    assert datamodeling_score(scores, subsets, losses) == alone
    assert datamodeling_score(scores[:, 1:], subsets, losses[:, 1:]).value is None


def test_reliability_is_that_of_another_mean_of_as_many_seeds() -> None:
    """Truth of variance 1, noise of variance 1, three seeds: 3 / 4."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=4000) + rng.normal(size=(3, 4000))
    found = reliability(values)
    assert found == pytest.approx(0.75, abs=0.03)
    again = values - values.mean(axis=1, keepdims=True)
    pairs = [spearman(again[i], again[j]) for i, j in itertools.combinations(range(3), 2)]
    r = np.mean(pairs)
    assert found == pytest.approx(3 * r / (1 + 2 * r))
    assert reliability(values[:1]) is None
    assert reliability(np.stack([values[0], -values[0]])) == 0.0


def test_changes_are_paired_by_seed_and_leave_out_rows_without_a_loss() -> None:
    rng = np.random.default_rng(6)
    without, full = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 5))
    full[:, 4], without[:, :, 4] = np.nan, np.nan
    found = changes(without, full)
    for s, k in itertools.product(range(2), range(3)):
        rises = [without[s, k, t] - full[s, t] for t in range(4)]
        assert found[s, k] == pytest.approx(np.mean(rises))


def test_random_rows_are_drawn_first_and_the_ends_are_those_of_the_others() -> None:
    scores = np.array([0.5, np.nan, 3, -1, 2, 2, 0, 0.1, -5, 0.2])
    found = extremes(scores, 2, 3, seed=0)
    again = extremes(-scores, 2, 3, seed=0)
    drawn = found["random"].tolist()
    assert drawn == again["random"].tolist(), "random rows depend on the scores that they judge"
    assert len(set(drawn)) == 3
    others = [i for i in range(10) if i not in drawn and i != 1]
    ranked = sorted(others, key=lambda i: (-scores[i], i))
    assert found["top"].tolist() == ranked[:2]
    assert found["bottom"].tolist() == ranked[-2:]
    few = extremes(scores, 100, 100, seed=0)
    assert [len(few[name]) for name in ("top", "bottom", "random")] == [1, 1, 5]
    assert len({*few["top"], *few["bottom"], *few["random"]}) == 7


def test_the_method_whose_ends_are_left_out_is_not_favoured() -> None:
    """Two methods that are equally good, told apart by whose ends were taken alone."""
    rng, found = np.random.default_rng(3), []
    for repeat in range(300):
        truth = rng.normal(size=120)
        one, other = (truth + 2.5 * rng.normal(size=120) for _ in range(2))
        rows = extremes(one, 20, 20, seed=repeat)
        by_rows = [rows["random"], np.concatenate(list(rows.values()))]
        found.append(
            [
                rank_correlations(s[chosen, None], truth[chosen, None])[0]
                for chosen in by_rows
                for s in (one, other)
            ]
        )
    own, fair, favoured, plain = np.mean(found, axis=0)
    assert own == pytest.approx(fair, abs=0.05), "random rows favour one of two equal methods"
    assert favoured > plain + 0.05, "the scene is not as it should be"


def test_sums_that_are_equal_are_ranked_as_equal() -> None:
    """The order of the terms leaves other last digits: they are no ranking."""
    rng = np.random.default_rng(8)
    subsets = draw_subsets(100, 60, 0.5, seed=0)
    losses = rng.normal(size=(60, 1))
    for constant in (0.1, 1e-9, -3e5):
        found = datamodeling_score(np.full((100, 1), constant), subsets, losses)
        assert found.value is None, f"a constant score has an LDS of {found.value}"
    few = np.where(rng.random((100, 1)) < 0.3, 0.3, 0.1)
    exact = np.array(
        [
            [(3 if s > 0.2 else 1) * m for s, m in zip(few[:, 0], subset, strict=True)]
            for subset in subsets
        ]
    ).sum(axis=1)
    expected = rank_correlations(exact[:, None].astype(float), -losses)[0]
    assert datamodeling_score(few, subsets, losses).value == pytest.approx(expected, abs=1e-12)


def test_left_out_weights_leave_out_one_row() -> None:
    weights = left_out_weights(5, 3)
    assert weights[[0, 1, 2, 4]].tolist() == [1, 1, 1, 1]
    assert 0 < weights[3] < 1e-10, "a weight of 0 would take the row, and its place, away"


def test_rows_without_a_score_count_with_the_mean() -> None:
    scores = np.array([[1.0, 4], [np.nan, 6], [3, np.nan], [5, 8]])
    found, missing = filled(scores)
    assert missing == 2
    assert found.tolist() == [[1, 4], [3, 6], [3, 6], [5, 8]]
    with pytest.raises(ValueError, match="not one row"):
        filled(np.full((3, 1), np.nan))


def test_mean_rank_weighs_targets_of_any_scale_alike() -> None:
    scores = np.array([[1.0, 300], [2, 100], [np.nan, 50], [3, 200]])
    found = mean_rank(scores)
    assert np.isnan(found[2])
    # Ranks 1, 2, 3 of the first and 4, 2, 3 of the second column.
    assert found[[0, 1, 3]].tolist() == [2.5, 2.0, 3.0]
