"""Batch-of-one autograd over full logits, and what tests of the engine share beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_models import tiny_model, wide_norms, with_lora

from influence.gradients import attributed_layers

POWER = {"mean": 1.0, "sum": 0.0, "sqrt": 0.5}


def setup(architecture: str, kind: str, dtype: torch.dtype = torch.float64, *, wide: bool = False):
    """A tiny model and its layers; kind: all, linear, lora, or one of the first "under lora".

    wide: with norms in the model's own precision.
    """
    model = tiny_model(architecture, dtype)
    if wide:
        model = wide_norms(model)
    if "lora" in kind:
        model = with_lora(model)
    return model, attributed_layers(model, kind.split()[0])


def oracle(model, layers, batch, reduction="mean"):
    """Losses and gradients {name: (b, out, in)} by autograd, one unpadded sample at a time."""
    weights = [layer.parameter for layer in layers]
    states = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    losses, gradients = [], {layer.name: [] for layer in layers}
    for row, length in enumerate(batch.lengths.tolist()):
        ids, labels = batch.input_ids[row : row + 1, :length], batch.labels[row, 1:length]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        wanted = labels != -100
        loss = F.cross_entropy(logits[wanted], labels[wanted], reduction="sum")
        loss = loss / int(wanted.sum()) ** POWER[reduction]
        losses.append(loss.detach())
        # An expert that no token reaches has the gradient zero.
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for layer, gradient in zip(layers, found, strict=True):
            gradients[layer.name].append(layer.shape.present(gradient))
    for weight, state in zip(weights, states, strict=True):
        weight.requires_grad_(state)
    return torch.stack(losses), {name: torch.stack(parts) for name, parts in gradients.items()}


def flat(gradients) -> torch.Tensor:
    """All layers' gradients side by side."""
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def random_targets(layers, count: int, dtype=torch.float64):
    """Standard normal matrices {name: (count, out, in)}."""
    generator = torch.Generator().manual_seed(9)
    return {
        layer.name: torch.randn(
            count, layer.out_features, layer.in_features, generator=generator, dtype=torch.float64
        ).to(dtype)
        for layer in layers
    }


def close(found, expected, message, rtol=1e-9):
    """Relative to the largest number, as entries that cancel have no relative precision."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * scale, msg=message)
