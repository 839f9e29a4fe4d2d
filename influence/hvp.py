"""Exact products of the target loss's Hessian with directions in parameter space.

Pearlmutter's way: the gradient of <gradient of the loss, v> is H v, so a second backward pass
through the first one gives the product, and no matrix of the parameters' size squared exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.blocks import eager_experts
from influence.errors import InputError
from influence.gradients.backward import frozen, members_of
from influence.gradients.layers import Layer
from influence.gradients.term import wide_dtype
from influence.loss import Reduction, TokenBatch, response_forward, sample_losses


def hessian_products(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[TokenBatch],
    directions: Mapping[str, Float[Tensor, "r out in"]],
    *,
    reduction: Reduction,
) -> tuple[dict[str, Float[Tensor, "r out in"]], int]:
    """The sum over samples of H_i v_k per layer name, for the r directions, and how many samples.

    H_i is the Hessian of sample i's reduced loss with respect to the attributed parameters alone
    (the blocks between them included); divide by the count for that of the mean loss. Directions
    and products are presented as the layers' gradients are. A batch takes one forward pass, one
    backward pass that keeps its graph, and one backward pass through both for each direction; the
    graph holds about three times the activations of training. Sums are float32 (float64 for a
    float64 model), on the model's device.

    Raises InputError if the directions are not those of exactly these layers.
    """
    _check(layers, directions)
    along = [_stored(layer, directions[layer.name]) for layer in layers]
    count = len(along[0])
    sums = [torch.zeros_like(each, dtype=wide_dtype(each.dtype)) for each in along]
    samples = 0
    with _differentiable_twice(model, layers):
        for batch in batches:
            size = batch.input_ids.shape[0]
            parameters = [layer.parameter for layer in layers]
            logits, labels, sample_index = response_forward(model, batch)
            loss = sample_losses(logits, labels, sample_index, size, reduction).sum()
            del logits
            gradients = torch.autograd.grad(
                loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            for index in range(count):
                for total, product in zip(
                    sums, _product(gradients, parameters, along, index, count), strict=True
                ):
                    total[index] += product
            samples += size
    shown = {
        layer.name: torch.stack([layer.shape.present(each) for each in total])
        for layer, total in zip(layers, sums, strict=True)
    }
    return shown, samples


def _product(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    along: Sequence[Tensor],
    index: int,
    count: int,
) -> tuple[Tensor, ...]:
    """The gradient of <gradients, direction number `index`>."""
    dot = torch.stack(
        [(g.to(v.dtype) * v[index]).sum() for g, v in zip(gradients, along, strict=True)]
    ).sum()
    if not dot.requires_grad:
        # Gradients that do not depend on the parameters: a loss linear in them.
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(
        dot,
        parameters,
        retain_graph=index + 1 < count,
        allow_unused=True,
        materialize_grads=True,
    )


@contextmanager
def _differentiable_twice(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Only the attributed parameters require gradients; kernels that have second derivatives."""
    with (
        frozen(model, members_of(model)),
        # Fused attention and grouped matrix products have no second derivative.
        sdpa_kernel(SDPBackend.MATH),
        eager_experts(model),
        torch.enable_grad(),
    ):
        for layer in layers:
            layer.parameter.requires_grad_(True)
        try:
            yield
        finally:
            for layer in layers:
                layer.parameter.requires_grad_(False)


def _stored(layer: Layer, directions: Float[Tensor, "r out in"]) -> Float[Tensor, "r ..."]:
    """Directions in the parameter's own layout and place, in the precision of sums."""
    parameter = layer.parameter
    moved = directions.to(parameter.device, wide_dtype(parameter.dtype))
    return torch.stack([layer.shape.stored(each, parameter.shape) for each in moved])


def _check(layers: Sequence[Layer], directions: Mapping[str, Tensor]) -> None:
    counts = {len(each) for each in directions.values()}
    shapes = {name: tuple(each.shape[1:]) for name, each in directions.items()}
    expected = {layer.name: (layer.out_features, layer.in_features) for layer in layers}
    if shapes != expected or len(counts) != 1 or not layers:
        odd = sorted(n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n))[:3]
        raise InputError(
            f"directions: expected the same number of directions of exactly the attributed "
            f"layers, but {odd or sorted(counts)} differ; compute them with the same layers"
        )
