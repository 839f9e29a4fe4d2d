"""The certificate against simulated pools where the truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import beta, rankdata

from influence.errors import InputError
from influence.fidelity import (
    TargetFidelity,
    certify,
    crossed_correlation,
    expected_recall,
    loo_r2,
    reliability_of,
    sketch_sd,
    spearman_of_rest,
    true_fidelity,
)
from influence.intervals import (
    bootstrap_counts,
    jackknife_quantile,
    recall_of_top,
    wilson_interval,
)
from influence.landmarks import choose_uniform, fit, predict, row_keys

POOL, LANDMARKS = 1200, 256


def _pool(seed: int, noise: float, sketch: float, shared: bool = False):
    """Scores with signal and noise; two noisy halves of them; the fitted regression's output.

    `shared`: the sketch's noise is a smooth function of the row, as it is where similar rows have
    similar gradients, so that the regression learns it.
    """
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((POOL, 8))
    truth = X @ rng.standard_normal(8) / 8**0.5 + 0.5 * np.sin(2 * X[:, 0])
    truth += noise * rng.standard_normal(POOL)
    errors = rng.standard_normal((2, POOL))
    if shared:
        waves = np.cos(0.5 * X @ rng.standard_normal((8, 64)) + rng.uniform(0, 2 * np.pi, 64))
        errors = rng.standard_normal((2, 64)) @ waves.T
        errors /= errors.std(axis=1, keepdims=True)
    halves = truth + sketch * 2**0.5 * errors
    scores = halves.mean(axis=0)
    keys = row_keys(seed, [f"row {i}".encode() for i in range(POOL)])
    marks = choose_uniform(keys, LANDMARKS)
    rest = np.setdiff1d(np.arange(POOL), marks)
    model = fit(X[marks], np.column_stack([scores, *halves])[marks])
    return truth, scores, halves, marks, rest, model, predict(model, X)[:, 0]


@pytest.mark.parametrize(("sketch", "shared"), [(0.0, False), (0.7, False), (0.35, True)])
@pytest.mark.parametrize("noise", [0.3, 1.5])
def test_spearman_interval_covers_the_rest_of_the_pool(sketch: float, shared: bool, noise: float):
    inside, error = 0, 0.0
    for seed in range(300):
        truth, scores, halves, marks, rest, model, predicted = _pool(seed, noise, sketch, shared)
        noisy = (halves[:, marks], model.loo_predictions[:, 1:].T) if sketch else ()
        found, corrected = spearman_of_rest(
            scores[marks], model.loo_predictions[:, 0], POOL, *noisy
        )
        actual, _ = true_fidelity(predicted[rest], truth[rest], 10)
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        assert actual is not None
        assert found.low <= found.value <= found.high
        assert corrected == bool(sketch), "attenuation must be corrected where halves agree"
        inside += found.low <= actual <= found.high
        error += (found.value - actual) / 300
    assert inside >= 0.92 * 300, f"coverage {inside / 300:.3f} of a nominal 95 % interval"
    assert abs(error) < 0.02, f"bias {error:.3f}: is the sketch noise corrected for, and once?"


def test_crossed_correlation_is_that_with_the_truth_whatever_noise_was_learnt():
    rng = np.random.default_rng(7)
    truth, learnt = rng.standard_normal(50_000), 0.8 * rng.standard_normal((2, 50_000))
    halves = truth + learnt
    # A regression that reproduces all of its half's noise: against its own half it looks perfect.
    predictions = 0.9 * halves
    mean = predictions.mean(axis=0)
    found = crossed_correlation(mean, halves, predictions)
    assert found == pytest.approx(np.corrcoef(mean, truth)[0, 1], abs=0.01)
    assert np.corrcoef(mean, halves.mean(axis=0))[0, 1] == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("noise", "sketch", "share"), [(0.3, 0, 0.05), (1.5, 0, 0.2), (0.3, 0.7, 0.2)]
)
def test_recall_and_score_intervals_cover_the_pool(noise: float, sketch: float, share: float):
    pools, inside, covered, error = 60, 0, 0.0, 0.0
    for seed in range(pools):
        _, scores, _, marks, rest, model, predicted = _pool(seed, noise, sketch)
        (found,) = certify(
            scores[marks, None], model.loo_predictions[:, :1], n=POOL, share=share, seed=seed
        )
        hybrid = predicted.copy()
        hybrid[marks] = scores[marks]
        _, recall = true_fidelity(hybrid, scores, round(share * POOL))
        assert found.recall.expected is not None
        assert found.score_halfwidth is not None
        assert found.recall.low is not None
        assert found.recall.high is not None
        inside += found.recall.low <= recall <= found.recall.high
        error += (found.recall.expected - recall) / pools
        covered += np.mean(np.abs(scores[rest] - predicted[rest]) <= found.score_halfwidth) / pools
    assert inside >= 0.92 * pools, f"recall interval covers {inside / pools:.2f}"
    assert abs(error) < 0.03, f"recall is biased by {error:.3f}: landmarks' share counted once?"
    assert 0.85 <= covered <= 0.95, f"90 % score intervals cover {covered:.3f}"


def test_score_interval_of_a_landmark_covers_the_unprojected_score():
    truth, scores, halves, marks, _, model, _ = _pool(3, 0.3, 0.7)
    (found,) = certify(
        scores[marks, None],
        model.loo_predictions[:, :1],
        n=POOL,
        share=0.1,
        halves=halves[:, marks, None],
        loo_halves=model.loo_predictions[:, 1:].T[:, :, None],
    )
    assert found.sketch_sd == pytest.approx(0.7, rel=0.15), "noise of the mean, not of one half"
    covered = np.mean(np.abs(truth[marks] - scores[marks]) <= found.landmark_halfwidth)
    assert 0.84 <= covered <= 0.96, f"90 % intervals of landmarks cover {covered:.3f}"


def test_reliability_is_the_squared_correlation_with_the_truth():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(20000)
    halves = truth + 0.8 * rng.standard_normal((2, 20000))
    ranks = [rankdata(v) for v in (truth, halves.mean(axis=0))]
    expected = np.corrcoef(*ranks)[0, 1] ** 2
    assert reliability_of(halves) == pytest.approx(expected, abs=0.02), "Spearman-Brown: 2r / (1+r)"
    assert sketch_sd(halves) == pytest.approx(0.8 / 2**0.5, rel=0.03)


def test_halves_that_disagree_leave_the_upper_limit_open():
    rng = np.random.default_rng(1)
    y, predicted = rng.standard_normal((2, 100))
    halves, loo_halves = rng.standard_normal((2, 2, 100))
    found, corrected = spearman_of_rest(y, predicted, 1000, halves, loo_halves)
    assert not corrected
    assert found.high == 1.0, "an unknown reliability cannot bound the true correlation"


def test_r2_is_the_definition_and_zero_for_the_mean():
    y = np.array([1.0, 2.0, 4.0, 9.0])
    others = np.array([np.delete(y, i).mean() for i in range(4)])
    assert loo_r2(y, others) == pytest.approx(0.0, abs=1e-12), "baseline must be left-one-out too"
    predicted = np.array([2.0, 2.0, 3.0, 8.0])
    expected = 1 - ((y - predicted) ** 2).sum() / ((y - others) ** 2).sum()
    assert loo_r2(y, predicted) == pytest.approx(expected, rel=1e-12)


def _slow_recall(y, predicted, counts, share, exact):
    items = [(v, i, exact * counts[i]) for i, v in enumerate(y)]
    items += [(v, i, (1 - exact) * counts[i]) for i, v in enumerate(predicted)]
    top = share * sum(counts)
    by_score, left = dict.fromkeys(range(len(y)), 0.0), top
    for i in sorted(range(len(y)), key=lambda i: -y[i]):
        by_score[i] = min(left, counts[i])
        left -= by_score[i]
    hit, left = 0.0, top
    for _, i, mass in sorted(items, key=lambda item: -item[0]):
        taken = min(left, mass)
        left -= taken
        inside = by_score[i] / counts[i] * mass if counts[i] else 0.0
        hit += min(taken, inside)
    return hit / top


def test_recall_of_top_against_a_plain_loop():
    rng = np.random.default_rng(2)
    y = rng.standard_normal(30)
    predicted = 0.5 * y + 0.3 * rng.standard_normal(30)
    counts = bootstrap_counts(30, 40, seed=0)
    for share, exact in ((0.1, 0.2), (0.33, 0.05), (1.0, 0.5), (0.2, 1.0)):
        fast = recall_of_top(y, predicted, counts, share, exact)
        slow = [_slow_recall(y, predicted, row.tolist(), share, exact) for row in counts]
        np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-12, err_msg=f"{share} {exact}")


def test_recall_is_one_where_nothing_can_be_missed():
    rng = np.random.default_rng(3)
    y, predicted = rng.standard_normal((2, 50))
    counts = bootstrap_counts(50, 200, seed=0)
    everything = expected_recall(y, predicted, 1000, 1.0, counts)
    assert everything.expected == pytest.approx(1.0, rel=1e-12)
    assert everything.low == pytest.approx(1.0, rel=1e-12), "a selected pool has all of its top"
    all_exact = expected_recall(y, predicted, 50, 0.1, counts)
    assert all_exact.expected == pytest.approx(1.0, rel=1e-12), "exact scores find the exact top"
    perfect = expected_recall(y, y, 1000, 0.1, counts)
    assert perfect.low is not None
    assert perfect.low < 0.8, "five landmarks found out of five do not prove a recall of 1"


def test_jackknife_quantile_has_the_finite_sample_rank():
    residuals = np.array([-9.0, 1, 2, 3, -4, 5, 6, 7, 8])
    assert jackknife_quantile(residuals, 0.9) == 9.0, "ceil(0.9 * 10) = 9th smallest of 9"
    assert jackknife_quantile(residuals, 0.5) == 5.0
    assert jackknife_quantile(residuals[:8], 0.9) is None, "8 residuals cannot give 90 %"


def test_wilson_interval_is_close_to_jeffreys_in_the_middle():
    low, high = wilson_interval(0.4, 200)
    exact = beta.ppf([0.025, 0.975], 80.5, 120.5)
    np.testing.assert_allclose([low, high], exact, rtol=0, atol=0.005)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0, rel=1e-12)


def test_constant_scores_give_null_not_nan():
    y = np.column_stack([np.full(20, 0.5), np.arange(20.0)])
    predicted = np.column_stack([np.arange(20.0), np.full(20, 1.0)])
    found = certify(
        y, predicted, n=100, share=0.1, halves=np.stack([y, y]), loo_halves=np.stack([y, y])
    )
    text = json.dumps([f.to_dict() for f in found], allow_nan=False)
    for entry in json.loads(text):
        assert entry["spearman"] == {"value": None, "low": None, "high": None}
        assert entry["recall"]["expected"] is None
    assert found[0].r2 is None
    assert found[1].r2 is not None


def test_only_calibration_landmarks_count():
    rng = np.random.default_rng(4)
    y = rng.standard_normal((60, 1))
    predicted = y + 0.5 * rng.standard_normal((60, 1))
    mask = np.arange(60) < 40
    y[40:] += 100.0  # rounds that went for the head of the ranking are no fair sample
    found: list[TargetFidelity] = certify(y, predicted, n=500, share=0.1, calibration=mask)
    assert found == certify(y[:40], predicted[:40], n=500, share=0.1)


def test_errors_name_what_is_wrong():
    y = np.zeros((5, 1))
    with pytest.raises(InputError, match=r"landmarks\.count"):
        certify(y[:3], y[:3], n=100, share=0.1)
    with pytest.raises(InputError, match=r"selection\.budget"):
        certify(y, y, n=100, share=0.0)
    with pytest.raises(InputError, match="not finite"):
        certify(y + np.nan, y, n=100, share=0.1)


def test_true_fidelity_by_hand():
    truth = np.array([4.0, 3.0, 2.0, 1.0])
    rho, recall = true_fidelity(np.array([4.0, 2.0, 3.0, 1.0]), truth, 2)
    # d^2 = 0 + 1 + 1 + 0: 1 - 6 * 2 / (4 * 15) = 0.8
    assert rho == pytest.approx(0.8, rel=1e-12)
    assert recall == 0.5
    assert true_fidelity(np.ones(4), truth, 2).spearman is None
