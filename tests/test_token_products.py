"""Token gradients' inner products against autograd, one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import close, flat, oracle, random_targets, setup
from tiny_models import random_batch

from influence.gradients import block_layout
from influence.token_products import max_over_tokens, split_directions, token_products


def by_autograd(model, layers, batch, targets):
    """<g_token, u>, a list of (tokens, m) for every sample, from a backward pass for each token."""
    weights = [layer.parameter for layer in layers]
    states = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    found = []
    for row, length in enumerate(batch.lengths.tolist()):
        ids, labels = batch.input_ids[row : row + 1, :length], batch.labels[row, 1:length]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        wanted = labels != -100
        losses = F.cross_entropy(logits[wanted], labels[wanted], reduction="none")
        rows = []
        for loss in losses:
            gradients = torch.autograd.grad(
                loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            shown = [x.shape.present(g) for x, g in zip(layers, gradients, strict=True)]
            rows.append(
                torch.stack(
                    [
                        sum((targets[x.name][k] * g).sum() for x, g in zip(layers, shown))  # noqa: B905
                        for k in range(3)
                    ]
                )
            )
        found.append(torch.stack(rows))
    for weight, state in zip(weights, states, strict=True):
        weight.requires_grad_(state)
    return found


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "lora"), ("gpt2", "lora"), ("gpt2", "all")]
)
def test_products_of_every_token_and_the_strongest_one(architecture, kind):
    model, layers = setup(architecture, kind)
    batch = random_batch()
    targets = random_targets(layers, 3)
    wide = torch.cat([targets[b.name].flatten(1) for b in block_layout(layers)], dim=1)
    directions = split_directions(layers, wide)
    for layer in layers:
        assert directions[layer.name].shape[1:] == layer.parameter.shape
    products, samples = token_products(model, batch, directions)
    expected = by_autograd(model, layers, batch, targets)
    rough = {"rtol": 1e-5}  # llama's norms compute in float32 whatever the model's precision is
    expected_rows = torch.cat(expected)
    close(products, expected_rows, "another token's gradient, or another direction", **rough)
    best = max_over_tokens(products, samples, len(expected))
    largest = torch.stack([rows.max(0).values for rows in expected])
    close(best, largest, "not a sample's own tokens", **rough)
    # The tokens add up to what a sample's gradient says.
    _losses, gradients = oracle(model, layers, batch, "sum")
    total = torch.zeros_like(best).index_add(0, samples, products)
    close(total, flat(gradients) @ flat(targets).T, "tokens do not add up to the sample", **rough)
