"""Predictions of the target loss after real optimiser steps: how fast their errors shrink."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_oracle import flat, oracle, setup
from tiny_models import random_batch

from influence.curvature import choose_directions, coefficients, subspace_curvature
from influence.gradients import weighted_gradients
from influence.hvp import hessian_products
from influence.optimizer_state import adam_offset, adam_scale
from influence.step_prediction import PredictedChange, predicted_change

N, BETA1, BETA2, EPS, DECAY, STEPS = 8, 0.8, 0.95, 1e-6, 0.1, 4
RATES = {"gd": (8e-4, 4e-4, 2e-4, 1e-4), "adamw": (2e-4, 1e-4, 5e-5, 2.5e-5)}


def _pool():
    return random_batch((9, 5, 12, 7, 8, 10, 6, 11), seed=1), random_batch((8, 11, 6), seed=2)


def _moments(layers):
    """Random moments of every layer, in the parameters' own layout."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in layers:
        first, second = torch.randn(2, *layer.parameter.shape, generator=generator).double()
        found[layer.name] = 0.05 * first, (0.05 * second).square() + 1e-3
    return found


def _step_of(kind: str, layers):
    """(a, b) by layer, as gradients are presented; None and None for gradient descent."""
    if kind == "gd":
        return None, None
    scale, offset = {}, {}
    rates = {"step": STEPS, "beta1": BETA1, "beta2": BETA2, "eps": EPS}
    for layer, (first, second) in zip(layers, _moments(layers).values(), strict=True):
        a = adam_scale(second, **rates)
        b = adam_offset(first, second, layer.parameter, **rates, weight_decay=DECAY)
        scale[layer.name], offset[layer.name] = layer.shape.present(a), layer.shape.present(b)
    return scale, offset


def _take_step(kind: str, layers, gradient, eta: float) -> None:
    """torch's own optimiser takes one step of rate eta along the weighted mean gradient."""
    parameters = [layer.parameter for layer in layers]
    for layer in layers:
        shown = gradient[layer.name]
        layer.parameter.grad = layer.shape.stored(shown, layer.parameter.shape)
    if kind == "gd":
        torch.optim.SGD(parameters, lr=eta).step()
        return
    optimizer = torch.optim.AdamW(
        parameters, lr=eta, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY
    )
    for parameter, (first, second) in zip(parameters, _moments(layers).values(), strict=True):
        # The formula freezes v; torch moves it by this very gradient, so it starts that much off.
        before = (second - (1 - BETA2) * parameter.grad.square()) / BETA2
        optimizer.state[parameter] = {
            "step": torch.tensor(float(STEPS)),
            "exp_avg": first.clone(),
            "exp_avg_sq": before,
        }
    optimizer.step()


def _mean_loss(model, layers, targets) -> float:
    return float(oracle(model, layers, targets)[0].mean())


def _prediction(model, layers, kind: str, weights: np.ndarray, eta: float) -> PredictedChange:
    """By p, q and Q along as many directions as the rows' rank."""
    pool, targets = _pool()
    scale, offset = _step_of(kind, layers)
    wide = {name: g.clone() for name, g in oracle(model, layers, pool)[1].items()}
    for name in scale or {}:
        wide[name] *= scale[name]
    A = flat(wide).numpy()
    g = flat(oracle(model, layers, targets)[1]).mean(0).numpy()
    chosen = choose_directions(A, N)
    V = weighted_gradients(
        model, layers, [pool], [torch.from_numpy(chosen.weights)], reduction="mean", scale=scale
    )
    if offset is not None:
        V = {name: torch.cat([each, offset[name][None]]) for name, each in V.items()}
    products, count = hessian_products(model, layers, [targets], V, reduction="mean")
    S = (flat(V) @ flat(products).T).numpy() / count
    r = chosen.weights.shape[1]
    Z = coefficients(A, chosen.image)
    if offset is None:
        curved, along = subspace_curvature(Z, S), 0.0
    else:
        curved = subspace_curvature(Z, S[:r, :r], S[:r, r], offset=S[r, r])
        along = float(g @ flat({n: b[None] for n, b in offset.items()})[0].numpy())
    return predicted_change(
        weights,
        A @ g,
        eta=eta,
        # The expansion has the negative curvature, too, which the programme leaves out.
        quadratic=curved.quadratic(weights, clipped=False),
        drift=curved.drift,
        offset_gradient=along,
        offset_curvature=curved.offset,
    )


def _slope(rates, errors) -> float:
    return float(np.polyfit(np.log(rates), np.log(np.abs(errors)), 1)[0])


@pytest.mark.parametrize("optimizer", ["gd", "adamw"])
@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_errors_fall_as_the_square_and_the_cube_of_the_rate(kind, optimizer):
    weights = np.random.default_rng(4).exponential(size=N)
    weights *= N / weights.sum()
    first, second = [], []
    for eta in RATES[optimizer]:
        model, layers = setup("llama", kind, wide=True)
        pool, targets = _pool()
        predicted = _prediction(model, layers, optimizer, weights, eta)
        rows = torch.from_numpy(weights / N)
        gradient = {
            name: torch.einsum("b,boi->oi", rows, g)
            for name, g in oracle(model, layers, pool)[1].items()
        }
        before = _mean_loss(model, layers, targets)
        _take_step(optimizer, layers, gradient, eta)
        change = _mean_loss(model, layers, targets) - before
        first.append(predicted.first - change)
        second.append(predicted.second - change)
    slopes = _slope(RATES[optimizer], first), _slope(RATES[optimizer], second)
    message = "the linear term's error does not fall as eta^2: a sign, p or b is wrong"
    assert slopes[0] == pytest.approx(2.0, abs=0.15), message
    message = "the quadratic's error does not fall as eta^3: a factor of q, Q or b'Hb is wrong"
    assert slopes[1] == pytest.approx(3.0, abs=0.15), message


def test_the_prediction_is_the_expansion_written_out():
    drawn = np.random.default_rng(0)
    A, b, g = drawn.normal(size=(6, 9)), drawn.normal(size=9), drawn.normal(size=9)
    root = drawn.normal(size=(9, 4))
    H, w, eta = root @ root.T, drawn.exponential(size=6), 0.3
    step = -eta * (A.T @ w / 6 + b)
    found = predicted_change(
        w,
        A @ g,
        eta=eta,
        quadratic=w @ A @ H @ A.T @ w / 6,
        drift=A @ H @ b,
        offset_gradient=g @ b,
        offset_curvature=b @ H @ b,
    )
    np.testing.assert_allclose(found.first, g @ step, rtol=1e-12)
    np.testing.assert_allclose(found.second, g @ step + step @ H @ step / 2, rtol=1e-12)
