"""Sum of the gradients of many samples, each scaled to unit length or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.gradients.backward import Consumer, backpropagate
from influence.gradients.contractions import wide
from influence.gradients.layers import Layer
from influence.gradients.per_sample import make_engine
from influence.loss import Reduction, TokenBatch


def mean_gradient(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[TokenBatch],
    *,
    reduction: Reduction,
    normalize: bool,
) -> tuple[dict[str, Float[Tensor, "out in"]], int]:
    """The sum over samples of g_i (or of g_i / |g_i|) per layer name, and the number of samples.

    Divide by the count for the mean; the sum is returned so that parts of a group add up. With
    `normalize` each batch takes two passes: exact norms first, then a pass whose output gradients
    are scaled by 1 / |g_i|. A sample whose gradient is exactly 0 has no direction: it adds nothing
    and is counted. Sums are float32 (float64 for a float64 model), on the model's device.
    """
    sums: dict[str, Tensor] = {}
    for layer in layers:
        weight = layer.rule.weight(layer.module)
        sums[layer.name] = torch.zeros(
            layer.out_features,
            layer.in_features,
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
    engine = make_engine(model, layers, reduction=reduction)

    count = 0
    for batch in batches:
        weights = None
        if normalize:
            norm = engine(batch).norm
            weights = torch.where(norm > 0, norm.reciprocal(), torch.zeros_like(norm))
        consume = _adder(sums, weights)
        backpropagate(model, layers, batch, reduction=reduction, consume=consume)
        count += batch.input_ids.shape[0]
    return sums, count


def _adder(sums: dict[str, Tensor], weights: Float[Tensor, " b"] | None) -> Consumer:
    def consume(layer: Layer, x: Tensor, d: Tensor) -> None:
        d = wide(d)
        # Here and not in the loss, where 1 / |g_i| could overflow a half-precision backward pass.
        if weights is not None:
            d = d * weights.to(d.dtype)[:, None, None]
        sums[layer.name].addmm_(d.flatten(0, 1).mT, wide(x).flatten(0, 1))

    return consume
