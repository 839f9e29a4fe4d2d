"""Factors of Q against dense matrices made with loops, and directions against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_oracle import flat, oracle, setup
from tiny_models import random_batch, rows_of

from influence.curvature import (
    choose_directions,
    coefficients,
    fisher_curvature,
    subspace_curvature,
)
from influence.errors import InputError
from influence.gradients import weighted_gradients

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def _matrices(n: int = 9, m: int = 4, size: int = 30, seed: int = 0):
    """Steps A, target gradients, an offset b, and a symmetric Hessian with negative eigenvalues."""
    drawn = np.random.default_rng(seed)
    H = drawn.normal(size=(size, size))
    return (
        drawn.normal(size=(n, size)),
        drawn.normal(size=(m, size)),
        drawn.normal(size=size),
        H + H.T,
    )


UNEQUAL = np.array([0.2, 0.1, 0.4, 0.3])


@pytest.mark.parametrize(("reduction", "power"), [("mean", 1.0), ("sqrt", 0.5), ("sum", 0.0)])
def test_the_fisher_factor_is_that_of_a_loop_over_deviations(reduction, power):
    """Dense, row by row, about the mean token's score; the factor by sums over pairs of rows."""
    A, G, b, _ = _matrices()
    tokens = np.array([3, 1, 11, 6])
    sizes = tokens ** (1 - power)  # of a row's Hessian, where a token's is 1
    scores = [g / size for g, size in zip(G, sizes, strict=True)]
    whole = sum(share * size for share, size in zip(UNEQUAL, sizes, strict=True))
    parts = [share * size / whole for share, size in zip(UNEQUAL, sizes, strict=True)]
    mean = sum(part * h for part, h in zip(parts, scores, strict=True))
    total, kept = np.zeros((A.shape[1], A.shape[1])), 0.0
    for t, h in enumerate(scores):
        total += parts[t] * tokens[t] * np.outer(h - mean, h - mean)
        for s in range(len(scores)):
            own = float(s == t) - parts[s]  # of score s in deviation t
            kept += parts[t] * tokens[t] * own**2 / tokens[s]
    H = whole * total / kept
    found = fisher_curvature(A @ G.T, UNEQUAL, tokens, G @ b, reduction=reduction)
    np.testing.assert_allclose(found.factor @ found.factor.T, A @ H @ A.T / len(A), **EXACT)
    np.testing.assert_allclose(found.drift, A @ H @ b, **EXACT)
    np.testing.assert_allclose(found.offset, b @ H @ b, **EXACT)


def test_equal_rows_have_the_unbiased_covariance_of_a_textbook():
    _, G, _, _ = _matrices()
    found = fisher_curvature(np.eye(G.shape[1]) @ G.T, np.full(4, 0.25), np.full(4, 7))
    message = "not T times the covariance with m - 1"
    expected = 7 * np.cov(G.T) / G.shape[1]
    np.testing.assert_allclose(
        found.factor @ found.factor.T, expected, rtol=1e-9, atol=1e-12, err_msg=message
    )


def test_a_gradient_that_all_rows_share_is_no_curvature():
    A, G, b, _ = _matrices()
    tokens = np.array([3, 1, 11, 6])
    common = np.random.default_rng(9).normal(size=G.shape[1])
    one, other = (fisher_curvature(A @ g.T, UNEQUAL, tokens, g @ b) for g in (G, G + 100 * common))
    for name in ("factor", "drift", "offset"):
        message = f"the mean target gradient is in the {name}"
        np.testing.assert_allclose(
            getattr(other, name), getattr(one, name), rtol=1e-8, atol=1e-9, err_msg=message
        )


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sqrt", "sum"])
def test_over_all_labels_the_fisher_curvature_averages_to_that_of_a_token(reduction, own):
    """A softmax of free logits, two rows of one and two tokens, every outcome of the labels.

    Labels of the model's own: the mean loss's Hessian, by autograd. Others: the covariance of a
    token's score, whatever its mean is.
    """
    logits = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    power = {"mean": 1.0, "sum": 0.0, "sqrt": 0.5}[reduction]
    tokens, shares = np.array([1, 2]), np.array([0.3, 0.7])
    chances = torch.softmax(logits, 0).detach() if own else torch.tensor([0.1, 0.7, 0.2])

    def loss(theta, labels):
        return -sum(torch.log_softmax(theta, 0)[k] for k in labels) / len(labels) ** power

    average, hessian = np.zeros((3, 3)), np.zeros((3, 3))
    for labels in np.ndindex(3, 3, 3):
        rows = [labels[:1], labels[1:]]
        G = np.stack([torch.autograd.grad(loss(logits, row), logits)[0].numpy() for row in rows])
        chance = float(np.prod([chances[k] for k in labels]))
        found = fisher_curvature(np.eye(3) @ G.T, shares, tokens, reduction=reduction, total=1)
        average += chance * found.factor @ found.factor.T
        for row, share in zip(rows, shares, strict=True):
            curved = torch.autograd.functional.hessian(lambda t, k=row: loss(t, k), logits)
            hessian += chance * share * np.asarray(curved)
    if not own:
        size = float(shares @ tokens ** (1 - power))
        hessian = size * np.asarray(torch.diag(chances) - torch.outer(chances, chances))
    message = f"{reduction}: biased; the mean over every outcome of the labels is not the curvature"
    np.testing.assert_allclose(average, hessian, rtol=1e-6, atol=1e-7, err_msg=message)


def test_the_pool_may_be_larger_than_the_rows_that_are_given():
    A, G, _, H = _matrices()
    shares = np.full(len(G), 0.25)
    P, T = A @ G.T, np.array([2, 2, 2, 5])
    whole, part = fisher_curvature(P, shares, T), fisher_curvature(P[:3], shares, T, total=len(P))
    np.testing.assert_allclose(part.factor, whole.factor[:3], **EXACT)
    S, Z = H[:5, :5], A[:, :5]
    whole, part = subspace_curvature(Z, S), subspace_curvature(Z[:3], S, total=len(Z))
    np.testing.assert_allclose(part.factor, whole.factor[:3], **EXACT)


def test_as_many_directions_as_the_rank_give_the_dense_matrix():
    """The landmark Q is the dense Q when every row is a landmark; nothing is uncovered."""
    A, _, b, H = _matrices()
    H = H @ H / 10  # positive definite
    found = choose_directions(A, len(A))
    V = A.T @ found.weights
    np.testing.assert_allclose(found.image, V, **EXACT)
    Z = coefficients(A, found.image)
    np.testing.assert_allclose(Z @ V.T, A, **EXACT)
    assert found.uncovered < 1e-12, "directions of full rank leave something uncovered"
    curved = subspace_curvature(Z, V.T @ H @ V, V.T @ H @ b, offset=1.5)
    np.testing.assert_allclose(curved.factor @ curved.factor.T, A @ H @ A.T / len(A), **EXACT)
    np.testing.assert_allclose(curved.drift, A @ H @ b, **EXACT)
    assert (curved.offset, curved.clipped) == (1.5, 0.0)


def test_coefficients_in_a_sketch_are_those_of_the_rows_themselves():
    """Sketching is linear: rows of rank 6 have exact coefficients in any sketch of 12 numbers."""
    drawn = np.random.default_rng(3)
    A = drawn.normal(size=(20, 6)) @ drawn.normal(size=(6, 300))
    sketch = A @ drawn.normal(size=(300, 12))
    found = choose_directions(sketch, 10)
    assert found.weights.shape == (20, 6), "more directions than the rows' rank"
    V = A.T @ found.weights
    Z = coefficients(sketch, found.image)
    np.testing.assert_allclose(Z @ V.T, A, rtol=1e-7, atol=1e-9)


def test_fewer_directions_cover_the_most_that_they_can():
    A, _, _, _ = _matrices(n=12)
    found = choose_directions(A, 3)
    Z = coefficients(A, found.image)
    left = ((A - Z @ found.image.T) ** 2).sum() / (A**2).sum()
    np.testing.assert_allclose(found.uncovered, left, **EXACT)
    for seed in range(20):
        other, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(A.shape[1], 3)))
        rest = ((A - A @ other @ other.T) ** 2).sum() / (A**2).sum()
        assert rest >= left, "a random span covers more than the singular directions"


def test_negative_curvature_is_clipped_and_counted():
    A, _, _, H = _matrices()
    found = choose_directions(A, 5)
    Z, V = coefficients(A, found.image), found.image
    S = V.T @ H @ V
    values, vectors = np.linalg.eigh(S)
    assert values[0] < 0, "the test no longer has negative curvature"
    crooked = S.copy()
    crooked[0, 1] += 0.5 * np.abs(S).max()
    crooked[1, 0] -= 0.5 * np.abs(S).max()
    curved = subspace_curvature(Z, crooked)
    nearest = vectors @ np.diag(values.clip(min=0)) @ vectors.T
    expected = Z @ nearest @ Z.T / len(Z)
    np.testing.assert_allclose(curved.factor @ curved.factor.T, expected, **EXACT)
    np.testing.assert_allclose(
        curved.clipped, -values[values < 0].sum() / np.abs(values).sum(), **EXACT
    )
    np.testing.assert_allclose(curved.asymmetry, 1.0, **EXACT)
    w = np.arange(1.0, len(Z) + 1)
    np.testing.assert_allclose(curved.quadratic(w), w @ expected @ w, **EXACT)
    whole = w @ Z @ S @ Z.T @ w / len(Z)
    np.testing.assert_allclose(curved.quadratic(w, clipped=False), whole, **EXACT)


def test_a_hessian_without_positive_curvature_leaves_no_factor():
    curved = subspace_curvature(np.eye(3), -np.eye(3))
    assert curved.factor.shape == (3, 0)
    assert curved.clipped == 1.0


def test_what_cannot_be_a_curvature_is_refused():
    for shares in ([2.0, -1.0], [0.5, 0.6], [np.nan, 1.0], [1.0]):
        with pytest.raises(InputError, match=r"expected a share above 0 .* sum 1"):
            fisher_curvature(np.eye(2), np.array(shares), np.ones(2, int))
    with pytest.raises(InputError, match=r"at least 1 token"):
        fisher_curvature(np.eye(2), np.array([0.5, 0.5]), np.array([3, 0]))
    with pytest.raises(InputError, match=r"weights.curvature: fisher .* at least 2.*hvp"):
        fisher_curvature(np.ones((3, 1)), np.ones(1), np.ones(1, int))
    with pytest.raises(InputError, match=r"Hessian-vector product .* not finite.*float32"):
        subspace_curvature(np.eye(2), np.array([[np.nan, 0], [0, 1.0]]))
    with pytest.raises(InputError, match=r"all zero; there is no direction"):
        choose_directions(np.zeros((3, 4)), 2)


MODELS = ["llama linear", "llama all", "gpt2 linear", "gpt2 all", "gpt_neox all", "mixtral all"]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("case", [*MODELS, "llama lora", "gpt2 lora"])
def test_weighted_sums_are_those_of_gradients_sample_by_sample(case, scaled):
    architecture, kind = case.split()
    model, layers = setup(architecture, kind)
    batch = random_batch()
    parts = [rows_of(batch, [2, 0]), rows_of(batch, [1, 3])]
    W = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, gradients = oracle(model, layers, batch)
    scale = None
    if scaled:
        generator = torch.Generator().manual_seed(6)
        scale = {
            layer.name: torch.rand(layer.out_features, layer.in_features, generator=generator)
            for layer in layers[1:]  # the first is left alone
        }
    found = weighted_gradients(
        model, layers, parts, [W[part.positions] for part in parts], reduction="mean", scale=scale
    )
    for layer in layers:
        expected = sum(W[row][:, None, None] * gradients[layer.name][row] for row in range(len(W)))
        if scale is not None and layer.name in scale:
            expected = expected * scale[layer.name]
        bound = 1e-9 * float(flat(gradients).abs().max())
        message = f"{layer.name}: the sum is not that of the weighted samples"
        torch.testing.assert_close(found[layer.name], expected, rtol=1e-9, atol=bound, msg=message)


def test_weights_that_do_not_fit_the_batch_are_refused():
    model, layers = setup("llama", "linear")
    with pytest.raises(InputError, match=r"shape \(3, 2\) for a batch of 4 samples"):
        weighted_gradients(model, layers, [random_batch()], [torch.ones(3, 2)], reduction="mean")
    with pytest.raises(InputError, match="at least one batch"):
        weighted_gradients(model, layers, [], [], reduction="mean")
