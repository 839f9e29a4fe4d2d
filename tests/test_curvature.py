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
    fisher_weights,
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


@pytest.mark.parametrize(("reduction", "power"), [("mean", 1.0), ("sqrt", 0.5), ("sum", 0.0)])
def test_the_fisher_factor_is_that_of_a_sum_over_target_rows(reduction, power):
    A, G, b, _ = _matrices()
    tokens = np.array([3, 1, 11, 6])
    H = sum(t**power * np.outer(g, g) for t, g in zip(tokens, G, strict=True)) / len(G)
    shares = np.full(len(G), 1 / len(G))
    found = fisher_curvature(A @ G.T, shares, fisher_weights(tokens, reduction), G @ b)
    np.testing.assert_allclose(found.factor @ found.factor.T, A @ H @ A.T / len(A), **EXACT)
    np.testing.assert_allclose(found.drift, A @ H @ b, **EXACT)
    np.testing.assert_allclose(found.offset, b @ H @ b, **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sqrt", "sum"])
def test_fisher_weights_make_the_second_moment_of_token_scores_the_hessian(reduction):
    """For a softmax of free logits and labels drawn from it, the Hessian is the Fisher matrix."""
    logits = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    tokens = 2
    power = {"mean": 1.0, "sum": 0.0, "sqrt": 0.5}[reduction]

    def loss(theta, labels):
        return -sum(torch.log_softmax(theta, 0)[k] for k in labels) / tokens**power

    chances = torch.softmax(logits, 0).detach()
    second, hessian = torch.zeros(3, 3), torch.zeros(3, 3)
    for first in range(3):
        for last in range(3):
            labels, chance = (first, last), chances[first] * chances[last]
            g = torch.autograd.grad(loss(logits, labels), logits)[0]
            second = second + chance * torch.outer(g, g)
            curved = torch.autograd.functional.hessian(lambda t, k=labels: loss(t, k), logits)
            hessian = hessian + chance * curved
    weight = float(fisher_weights(np.array([tokens]), reduction)[0])
    message = f"f_t of {reduction} does not turn the second moment into the Hessian"
    torch.testing.assert_close(weight * second, hessian, rtol=1e-9, atol=1e-12, msg=message)


def test_the_pool_may_be_larger_than_the_rows_that_are_given():
    A, G, _, H = _matrices()
    shares = np.full(len(G), 0.25)
    P, f = A @ G.T, fisher_weights(np.array([2, 2, 2, 5]))
    whole, part = fisher_curvature(P, shares, f), fisher_curvature(P[:3], shares, f, total=len(P))
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
    with pytest.raises(InputError, match=r"one finite weight of at least 0"):
        fisher_curvature(np.eye(2), np.array([1.0, -1.0]), np.ones(2))
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
