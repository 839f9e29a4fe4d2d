"""The posterior against scikit-learn, against Gaussian conditioning in full, and against refits."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, DotProduct, Matern

from influence.errors import InputError
from influence.features import make_features
from influence.kernels import KERNELS, WITH_BANDWIDTH, diagonal
from influence.posterior import (
    believe,
    calibrate,
    leave_one_out,
    no_evidence,
    observe,
    posterior_of,
)

RIDGE = 0.05


def _data(rows: int = 60, width: int = 6, targets: int = 3, seed: int = 0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rows, width)), draw.normal(size=(rows, targets))


def _fitted(X, Y, inducing, kernel="laplace", bandwidth=None):
    features = make_features(inducing, kernel=kernel, bandwidth=bandwidth)
    prior = no_evidence(features, ridge=RIDGE, mean=Y.mean(axis=0))
    return posterior_of(observe(prior, X, Y))


def _peer_kernel(kernel: str, bandwidth: float):
    return {
        "rbf": RBF(bandwidth),
        "laplace": Matern(bandwidth, nu=0.5),
        "linear": DotProduct(sigma_0=0.0),
    }[kernel]


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "linear"])
def test_it_is_the_gaussian_process_where_every_row_is_inducing(kernel: str):
    X, Y = _data()
    new = _data(seed=1)[0]
    posterior = _fitted(X, Y, X, kernel)
    belief = believe(posterior, new)
    width = posterior.evidence.features.bandwidth
    peer = GaussianProcessRegressor(_peer_kernel(kernel, width), alpha=RIDGE, optimizer=None)
    mean, spread = peer.fit(X, Y - Y.mean(axis=0)).predict(new, return_std=True)
    why = "the features do not span the kernel, or the noise is counted twice or not at all"
    np.testing.assert_allclose(
        belief.mean, mean + Y.mean(axis=0), rtol=1e-6, atol=1e-7, err_msg=why
    )
    expected = spread[:, 0] ** 2 + RIDGE
    np.testing.assert_allclose(belief.variance, expected, rtol=1e-6, atol=1e-7, err_msg=why)


@pytest.mark.parametrize("kernel", ["rbf", "laplace", "linear", "cosine"])
def test_with_few_inducing_rows_it_is_conditioning_on_the_low_rank_prior(kernel: str):
    """Brute force: the joint normal of observed and new scores under the approximate prior."""
    X, Y = _data()
    new, inducing = _data(seed=1)[0], X[:9]
    posterior = _fitted(X, Y, inducing, kernel)
    width = posterior.evidence.features.bandwidth
    k = KERNELS[kernel]
    inverse = np.linalg.pinv(k(inducing, inducing, width), rcond=1e-11, hermitian=True)
    everything = np.concatenate([X, new])
    cross = k(everything, inducing, width)
    low_rank = cross @ inverse @ cross.T
    rest = np.diag(diagonal(kernel, everything) - np.diag(low_rank) + RIDGE)
    prior = low_rank + rest
    n = len(X)
    gain = prior[n:, :n] @ np.linalg.inv(prior[:n, :n])
    mean = gain @ (Y - Y.mean(axis=0)) + Y.mean(axis=0)
    covariance = prior[n:, n:] - gain @ prior[:n, n:]
    belief = believe(posterior, new)
    why = "phi'mu or k - |phi|^2 + phi'Cov phi + ridge is not the conditional distribution"
    np.testing.assert_allclose(belief.mean, mean, rtol=1e-6, atol=1e-7, err_msg=why)
    np.testing.assert_allclose(
        belief.variance, np.diag(covariance), rtol=1e-6, atol=1e-7, err_msg=why
    )


def test_far_from_every_landmark_nothing_is_believed():
    X, Y = _data()
    posterior = _fitted(X, Y, X[:9], "rbf")
    belief = believe(posterior, np.full((1, X.shape[1]), 1e3))
    np.testing.assert_allclose(belief.variance, 1 + RIDGE, rtol=1e-9)
    np.testing.assert_allclose(belief.mean[0], Y.mean(axis=0), rtol=1e-9)


def test_observing_in_parts_is_observing_at_once():
    X, Y = _data()
    features = make_features(X[:20], kernel="laplace")
    prior = no_evidence(features, ridge=RIDGE, mean=Y[:20].mean(axis=0))
    at_once = observe(prior, X, Y)
    in_parts = observe(observe(observe(prior, X[:20], Y[:20]), X[20:21], Y[20:21]), X[21:], Y[21:])
    assert in_parts.rows == at_once.rows == len(X)
    for name in ("precision", "moment"):
        np.testing.assert_allclose(
            getattr(in_parts, name), getattr(at_once, name), rtol=1e-10, atol=1e-10
        )
    new = _data(seed=1)[0]
    for one, other in zip(
        believe(posterior_of(in_parts), new), believe(posterior_of(at_once), new), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("inducing", [9, 30])
def test_leave_one_out_is_observing_all_but_one(inducing: int):
    X, Y = _data(30)
    features = make_features(X[:inducing], kernel="laplace")
    prior = no_evidence(features, ridge=RIDGE, mean=Y.mean(axis=0))
    found = leave_one_out(posterior_of(observe(prior, X, Y)), X, Y)
    for i in (0, 8, 17, 29):
        rest = np.arange(len(X)) != i
        belief = believe(posterior_of(observe(prior, X[rest], Y[rest])), X[i : i + 1])
        why = "the leverage is not phi'Cov phi / noise of the row itself"
        np.testing.assert_allclose(
            found.residuals[i], Y[i] - belief.mean[0], rtol=1e-8, atol=1e-9, err_msg=why
        )
        np.testing.assert_allclose(found.variance[i], belief.variance[0], rtol=1e-8, err_msg=why)


def test_equal_rows_only_shorten_the_features():
    X, Y = _data(20)
    doubled = np.concatenate([X, X])
    plain, twice = (
        make_features(X, kernel="rbf", bandwidth=2.0),
        make_features(doubled, kernel="rbf", bandwidth=2.0),
    )
    assert twice.size <= len(X)
    new = _data(seed=1)[0]
    gram = [f(new) @ f(new).T for f in (plain, twice)]
    np.testing.assert_allclose(gram[1], gram[0], rtol=1e-5, atol=1e-6)
    assert Y.shape[0] == 20


def test_calibration_finds_scale_and_correlation_of_scores_drawn_from_the_model():
    draw = np.random.default_rng(3)
    X = draw.normal(size=(400, 4))
    features = make_features(X, kernel="laplace")
    phi = features(X)
    scale = np.array([0.2, 3.0])
    mixing = np.linalg.cholesky(np.array([[1.0, 0.8], [0.8, 1.0]])).T * scale
    found = []
    for _ in range(10):
        field = phi @ draw.normal(size=(features.size, 2))
        noise = np.sqrt(RIDGE) * draw.normal(size=field.shape)
        Y = (field + noise) @ mixing
        prior = no_evidence(features, ridge=RIDGE, mean=np.zeros(2))
        posterior = posterior_of(observe(prior, X, Y))
        found.append(calibrate(leave_one_out(posterior, X, Y)))
    np.testing.assert_allclose(np.mean([c.scale for c in found], axis=0), scale, rtol=0.05)
    between = np.mean([c.correlation[0, 1] for c in found])
    assert between == pytest.approx(0.8, abs=0.03), "errors of two targets are drawn together"
    assert found[0].rows == len(X)


def test_calibration_of_more_targets_than_rows_is_a_correlation_matrix():
    X, Y = _data(8, targets=20)
    Y[:, 3] = 1.0
    posterior = _fitted(X, Y, X)
    found = calibrate(leave_one_out(posterior, X, Y))
    assert np.linalg.eigvalsh(found.correlation).min() > 0
    assert found.scale[3] == pytest.approx(0, abs=1e-12), "a constant target has no errors"


def test_a_ridge_of_zero_is_refused():
    X, _ = _data(5)
    with pytest.raises(InputError, match=r"landmarks.damping: a ridge of 0"):
        no_evidence(make_features(X, kernel="laplace"), ridge=0.0, mean=np.zeros(1))


def test_every_kernel_with_a_bandwidth_is_one_on_the_diagonal():
    X, _ = _data(10)
    for name in WITH_BANDWIDTH:
        np.testing.assert_allclose(np.diag(KERNELS[name](X, X, 2.0)), 1.0, rtol=1e-6)
        np.testing.assert_array_equal(diagonal(name, X), np.ones(10))
