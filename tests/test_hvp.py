"""Hessian-vector products against differences of gradients and against symmetry, in float64."""

from __future__ import annotations

import pytest
import torch
from gradient_oracle import oracle, random_targets, setup
from tiny_models import random_batch, rows_of

from influence.errors import InputError
from influence.hvp import hessian_products

CASES = [
    *("llama linear", "llama all", "llama lora", "gpt2 linear", "gpt2 all", "gpt2 lora"),
    "qwen3 all",
]
STEP = 1e-5


def _summed(model, layers, batch, reduction):
    """The summed gradient {name: (out, in)} by autograd, one sample at a time."""
    return {n: g.sum(0) for n, g in oracle(model, layers, batch, reduction)[1].items()}


def _moved(layers, direction, step: float) -> None:
    with torch.no_grad():
        for layer in layers:
            shift = layer.shape.stored(direction[layer.name], layer.parameter.shape)
            layer.parameter.add_(shift, alpha=step)


def _difference(model, layers, batch, direction, reduction="mean"):
    """(gradient at theta + h v - gradient at theta - h v) / 2h."""
    _moved(layers, direction, STEP)
    ahead = _summed(model, layers, batch, reduction)
    _moved(layers, direction, -2 * STEP)
    behind = _summed(model, layers, batch, reduction)
    _moved(layers, direction, STEP)
    return {name: (ahead[name] - behind[name]) / (2 * STEP) for name in ahead}


def _one(directions, index: int):
    return {name: each[index] for name, each in directions.items()}


def _scaled(directions, factor: float = 0.1):
    return {name: factor * each for name, each in directions.items()}


@pytest.mark.parametrize("case", CASES)
def test_products_are_the_differences_of_gradients(case):
    model, layers = setup(*case.split(), wide=True)
    batch = random_batch()
    parts = [rows_of(batch, [2, 0]), rows_of(batch, [1, 3])]
    directions = _scaled(random_targets(layers, 2))
    before = [p.requires_grad for p in model.parameters()]
    found, count = hessian_products(model, layers, parts, directions, reduction="mean")
    assert count == 4
    assert [p.requires_grad for p in model.parameters()] == before, "the model was left changed"
    for index in range(2):
        expected = _difference(model, layers, batch, _one(directions, index))
        size = max(float(each.abs().max()) for each in expected.values())
        assert size > 0
        for name, each in expected.items():
            message = f"{name}: H v is not the change of the gradient along v"
            torch.testing.assert_close(
                found[name][index], each, rtol=1e-5, atol=1e-6 * size, msg=message
            )


@pytest.mark.parametrize("reduction", ["sum", "sqrt"])
def test_products_are_of_the_reduced_loss(reduction):
    model, layers = setup("llama", "linear", wide=True)
    batch, directions = random_batch(), _scaled(random_targets(layers, 1))
    found, _ = hessian_products(model, layers, [batch], directions, reduction=reduction)
    expected = _difference(model, layers, batch, _one(directions, 0), reduction)
    size = max(float(each.abs().max()) for each in expected.values())
    for name, each in expected.items():
        torch.testing.assert_close(found[name][0], each, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("case", ["llama linear", "gpt2 all", "llama lora"])
def test_the_hessian_is_symmetric(case):
    model, layers = setup(*case.split(), wide=True)
    directions = random_targets(layers, 3)
    found, _ = hessian_products(model, layers, [random_batch()], directions, reduction="mean")
    S = sum(
        torch.einsum("joi,koi->jk", directions[layer.name], found[layer.name]) for layer in layers
    )
    error = float((S - S.T).abs().max() / S.abs().max())
    assert error < 1e-10, f"u'Hv and v'Hu differ by {error:.1e} of the largest entry"


def test_a_product_does_not_depend_on_the_batches_or_on_other_directions():
    model, layers = setup("llama", "linear", wide=True)
    batch, directions = random_batch(), random_targets(layers, 2)
    together, _ = hessian_products(model, layers, [batch], directions, reduction="mean")
    alone, _ = hessian_products(
        model,
        layers,
        [rows_of(batch, [row]) for row in range(4)],
        {name: each[1:] for name, each in directions.items()},
        reduction="mean",
    )
    for name, each in alone.items():
        scale = float(each.abs().max())
        torch.testing.assert_close(each[0], together[name][1], rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("case", ["llama linear", "llama lora"])
def test_directions_share_a_pass_and_each_has_the_bits_that_it_has_alone(case):
    model, layers = setup(*case.split(), wide=True)
    model, batch = model.float(), random_batch()
    directions = {name: each.float() for name, each in random_targets(layers, 3).items()}
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    together, _ = hessian_products(model, layers, [batch], directions, reduction="mean")
    handle.remove()
    assert len(passes) == 1, "every direction made a forward pass of its own"
    for k in range(3):
        one = {name: each[k : k + 1] for name, each in directions.items()}
        alone, _ = hessian_products(model, layers, [batch], one, reduction="mean")
        for name, each in alone.items():
            same = torch.equal(each[0], together[name][k])
            assert same, f"{name}: a product's bits depend on the directions beside it"


def test_directions_of_other_layers_are_refused():
    model, layers = setup("llama", "linear", wide=True)
    directions = random_targets(layers[1:], 1)
    with pytest.raises(InputError, match=rf"exactly the attributed layers.*{layers[0].name}"):
        hessian_products(model, layers, [random_batch()], directions, reduction="mean")
