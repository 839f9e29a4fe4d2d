"""Landmark choice and kernel ridge regression against dense solves, refits and scikit-learn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from influence.errors import InputError
from influence.kernels import KERNELS, median_distance, squared_distances
from influence.landmarks import (
    CHOOSERS,
    choose_stratified,
    choose_uniform,
    fit,
    predict,
    row_keys,
)


def _data(seed: int, count: int = 40, width: int = 5, targets: int = 3):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((count, width)) + 3.0
    Y = np.sin(X @ rng.standard_normal((width, targets))) + rng.standard_normal(targets) * 5
    return X, Y


def _slow_kernel(name: str, x: np.ndarray, z: np.ndarray, bandwidth: float) -> np.ndarray:
    out = np.empty((len(x), len(z)))
    for i, a in enumerate(x):
        for j, b in enumerate(z):
            if name == "rbf":
                out[i, j] = np.exp(-np.sum((a - b) ** 2) / (2 * bandwidth**2))
            elif name == "laplace":
                out[i, j] = np.exp(-np.linalg.norm(a - b) / bandwidth)
            elif name == "linear":
                out[i, j] = np.dot(a, b)
            else:
                out[i, j] = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    return out


def test_distances_survive_a_large_common_shift():
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((6, 4)), rng.standard_normal((7, 4))
    slow = ((x[:, None] - z[None]) ** 2).sum(axis=2)
    shifted = squared_distances(x + 1e6, z + 1e6)
    np.testing.assert_allclose(
        shifted, slow, rtol=1e-7, atol=0, err_msg="distances are not taken about the centre"
    )


def test_median_distance_over_pairs_and_with_duplicates():
    x = np.array([[0.0], [1.0], [3.0]])
    assert median_distance(x) == pytest.approx(2.0, rel=1e-12), "pairs are 1, 3, 2: median 2"
    mostly_equal = np.array([[5.0]] * 9 + [[7.0]])
    assert median_distance(mostly_equal) == pytest.approx(2.0, rel=1e-9), "zero bandwidth"
    assert median_distance(np.ones((4, 2))) == 1.0, "equal rows must still give a usable bandwidth"


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_regression_is_the_dense_solve(kernel: str, damping: float):
    X, Y = _data(1)
    new = np.random.default_rng(2).standard_normal((11, 5)) + 3.0
    model = fit(X, Y, kernel=kernel, damping=damping)
    pairs = [np.linalg.norm(X[i] - X[j]) for i in range(len(X)) for j in range(i)]
    bandwidth = float(np.median(pairs))
    K = _slow_kernel(kernel, X, X, bandwidth)
    alpha = np.linalg.solve(K + damping * np.mean(np.diag(K)) * np.eye(len(X)), Y - Y.mean(0))
    expected = _slow_kernel(kernel, new, X, bandwidth) @ alpha + Y.mean(0)
    np.testing.assert_allclose(
        predict(model, new),
        expected,
        rtol=1e-8,
        atol=1e-8,
        err_msg="ridge, bandwidth or mean differ from (K + d mean(diag K) I)^-1 (Y - mean)",
    )


def test_regression_is_scikit_learns_kernel_ridge():
    from sklearn.kernel_ridge import KernelRidge

    X, Y = _data(3)
    new = np.random.default_rng(4).standard_normal((9, 5)) + 3.0
    model = fit(X, Y, kernel="rbf", damping=0.05)
    peer = KernelRidge(alpha=0.05, kernel="rbf", gamma=0.5 / model.bandwidth**2)
    peer.fit(X, Y - Y.mean(0))
    np.testing.assert_allclose(
        predict(model, new),
        peer.predict(new) + Y.mean(0),
        rtol=1e-9,
        atol=1e-9,
        err_msg="not kernel ridge with gamma = 1 / (2 bandwidth^2)",
    )


def test_prediction_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch):
    X, Y = _data(5)
    new = np.random.default_rng(6).standard_normal((23, 5)).astype(np.float32)
    model = fit(X, Y)
    whole = predict(model, new)
    monkeypatch.setattr("influence.landmarks._BLOCK_ENTRIES", 3 * len(X))
    np.testing.assert_allclose(
        predict(model, new), whole, rtol=1e-12, atol=1e-12, err_msg="a block is lost or shifted"
    )


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_leave_one_out_is_refitting_without_each_landmark(kernel: str, seed: int):
    X, Y = _data(seed, count=25)
    model = fit(X, Y, kernel=kernel, damping=0.02)
    for i in range(len(X)):
        keep = np.arange(len(X)) != i
        # the mean is refitted; the bandwidth and the ridge of the full fit are held
        mean = Y[keep].mean(0)
        K = _slow_kernel(kernel, X[keep], X[keep], model.bandwidth)
        alpha = np.linalg.solve(K + model.ridge * np.eye(keep.sum()), Y[keep] - mean)
        refitted = _slow_kernel(kernel, X[i : i + 1], X[keep], model.bandwidth)[0] @ alpha + mean
        np.testing.assert_allclose(
            model.loo_predictions[i],
            refitted,
            rtol=1e-8,
            atol=1e-8,
            err_msg=f"landmark {i}: the mean is not refitted or the ridge is not held",
        )
        np.testing.assert_allclose(
            model.loo_residuals[i], Y[i] - refitted, rtol=1e-7, atol=1e-8, err_msg="sign"
        )


def test_duplicates_and_zero_embeddings_are_fitted():
    X, Y = _data(7)
    X[10:30] = X[9]
    model = fit(X, Y, damping=1e-2)
    K = _slow_kernel("rbf", X, X, model.bandwidth) + model.ridge * np.eye(len(X))
    np.testing.assert_allclose(
        K @ model.alpha, Y - Y.mean(0), rtol=0, atol=1e-8, err_msg="bad solve with duplicates"
    )
    zero = fit(np.zeros_like(X), Y, kernel="linear")
    np.testing.assert_allclose(
        predict(zero, X[:2]),
        np.tile(Y.mean(0), (2, 1)),
        rtol=1e-12,
        err_msg="embeddings that say nothing must predict the mean",
    )
    with pytest.raises(InputError, match=r"landmarks\.damping"):
        fit(np.zeros_like(X), Y, kernel="linear", damping=0.0)


def test_calibration_marks_without_changing_the_fit():
    X, Y = _data(8)
    mask = np.arange(len(X)) < 30
    marked, plain = fit(X, Y, calibration=mask), fit(X, Y)
    np.testing.assert_array_equal(marked.calibration, mask)
    assert plain.calibration.all(), "by default all landmarks are taken for uniformly drawn"
    np.testing.assert_allclose(marked.alpha, plain.alpha, rtol=0, atol=0)


def test_errors_name_what_is_wrong():
    X, Y = _data(9)
    with pytest.raises(InputError, match=r"landmarks\.count: 2 landmarks"):
        fit(X[:2], Y[:2])
    X[4, 1] = np.nan
    with pytest.raises(InputError, match="embedding of row 4"):
        fit(X, Y)
    with pytest.raises(InputError, match=r"landmarks\.kernel: 'poly'"):
        fit(X, Y, kernel="poly")
    model = fit(X[5:], Y[5:])
    with pytest.raises(InputError, match="embedding of row 4"):
        predict(model, X)


def _digests(count: int, first: int = 0) -> list[bytes]:
    return [f"row {i}".encode() for i in range(first, first + count)]


def test_uniform_choice_is_seeded_and_uniform():
    keys = row_keys(3, _digests(100))
    np.testing.assert_array_equal(choose_uniform(keys, 5), choose_uniform(keys.copy(), 5))
    np.testing.assert_array_equal(choose_uniform(keys[:4], 9), np.arange(4), err_msg="n < count")
    hits: Counter[int] = Counter()
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(4000):
        rows = choose_uniform(row_keys(seed, _digests(10)), 3).tolist()
        hits.update(rows)
        pairs.update((i, j) for i in rows for j in rows if i < j)
    share = np.array([hits[row] for row in range(10)]) / 4000
    np.testing.assert_allclose(share, 0.3, rtol=0, atol=0.035, err_msg="not uniform")
    together = np.array([pairs[i, j] for i in range(10) for j in range(i + 1, 10)]) / 4000
    np.testing.assert_allclose(together, 3 / 45, rtol=0, atol=0.02, err_msg="rows go in pairs")


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_a_choice_stays_when_the_pool_or_the_count_grows(seed: int):
    digests = _digests(300)
    small, large = (choose_uniform(row_keys(seed, digests), count) for count in (20, 60))
    assert set(small.tolist()) <= set(large.tolist()), "a larger count lost a landmark"
    # 100 new rows in front and behind: what was chosen is chosen, but for new rows with lower keys.
    grown = [*_digests(50, 300), *digests, *_digests(50, 350)]
    chosen = {grown[i] for i in choose_uniform(row_keys(seed, grown), 60).tolist()}
    old = {digests[i] for i in large.tolist()}
    new = set(grown) - set(digests)
    assert chosen - new <= old, "an old row was drawn again in a grown pool"
    assert len(chosen & old) == 60 - len(chosen & new)
    assert len(chosen & new) < 30, "new rows are favoured"


def test_keys_are_those_of_no_other_draw():
    """With the numbers of `random_scores` the landmarks would be the rows it ranks last."""
    from influence.scoring import random_scores

    digests = _digests(200)
    drawn = random_scores(5, digests)[:, 0]
    keys = row_keys(5, digests)
    assert len(set(keys.tolist())) == 200
    assert abs(np.corrcoef(drawn, keys.astype(float))[0, 1]) < 0.3, "the same draw as method random"
    assert (row_keys(6, digests) != keys).all(), "the seed is not in the key"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 15, 16, 50, 99, 110, 111])
def test_stratified_choice_allocates_in_proportion(count: int):
    sources = ["big"] * 80 + ["mid"] * 28 + ["tiny"] * 2 + ["one"]
    rows = choose_stratified(row_keys(1, _digests(111)), sources, count)
    taken = Counter(sources[row] for row in rows.tolist())
    sizes = Counter(sources)
    assert len(set(rows.tolist())) == count, "rows repeat or the allocation does not sum to count"
    assert (np.diff(rows) > 0).all(), "not sorted"
    for source, size in sizes.items():
        share = count * size / len(sources)
        assert taken[source] <= size, f"{source} gives more rows than it has"
        if count >= 4 * len(sizes):
            assert taken[source] >= 1, f"{source} has no landmark although count allows one"
            # two small sources raised to one row cost the others two rows at most
            assert abs(taken[source] - share) < 3, f"{source}: {taken[source]} for {share}"
        else:
            assert abs(taken[source] - share) < 1, f"{source}: {taken[source]} for {share}: a floor"


def test_many_small_sources_do_not_take_the_landmarks_of_a_large_one():
    # 90 % of the rows are of one source; a floor of one row would give it 10 of 40 landmarks.
    sources = ["large"] * 900 + [f"small {i % 30}" for i in range(100)]
    rows = choose_stratified(row_keys(0, _digests(1000)), sources, 40)
    large = sum(sources[row] == "large" for row in rows.tolist())
    assert large == 36, f"{large} of 40 landmarks for a source with 90 % of the rows"


def test_stratified_choice_matches_largest_remainder_by_hand():
    sources = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    keys = row_keys(0, _digests(100))
    # shares of 7: 3.5, 2.1, 1.4 -> floors 3, 2, 1, and the row left goes to .5
    rows = CHOOSERS["stratified"](keys, sources, 7).tolist()
    assert Counter(sources[row] for row in rows) == {"a": 4, "b": 2, "c": 1}, (
        "not largest remainder"
    )
    by_key = sorted(range(50), key=lambda row: keys[row])[:4]
    assert set(by_key) == {row for row in rows if row < 50}, "not the smallest keys of the source"
    hits = Counter(
        row
        for seed in range(1000)
        for row in choose_stratified(row_keys(seed, _digests(100)), sources, 10).tolist()
    )
    inside = np.array([hits[row] for row in range(50)]) / 1000
    np.testing.assert_allclose(inside, 0.1, rtol=0, atol=0.05, err_msg="not uniform in a source")
