"""Weighted sums of the gradients of many samples: several sums from one pass over the samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.backward import Consumer, backpropagate, members_of
from influence.gradients.contractions import formed_gradients, wide
from influence.gradients.layers import Layer
from influence.gradients.term import Formed, Term, part_runs, wide_dtype
from influence.loss import Reduction, TokenBatch


def weighted_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[TokenBatch],
    weights: Iterable[Float[Tensor, "b r"]],
    *,
    reduction: Reduction,
    scale: Mapping[str, Float[Tensor, "out in"]] | None = None,
) -> dict[str, Float[Tensor, "r out in"]]:
    """sum_i weights[i, k] (a * g_i) per layer name, for the r columns k, all from one pass.

    `weights` has one matrix for every batch, its rows in the batch's order. Every layer's
    per-sample gradients are formed a few at a time and added up. `scale` is a, entry by entry (an
    optimiser's preconditioner), 1 for layers that it does not name. Sums are float32 (float64 for a
    float64 model), on the model's device: r times the size of the attributed parameters.

    Raises InputError where weights do not fit their batch, or there is no batch.
    """
    sums: dict[str, Tensor] = {}
    members = members_of(model)
    for batch, own in zip(batches, weights, strict=True):
        if own.ndim != 2 or len(own) != len(batch.input_ids):
            raise InputError(
                f"weights of shape {tuple(own.shape)} for a batch of {len(batch.input_ids)} "
                "samples; expected a row for each"
            )
        sums = sums or _zeros(layers, own.shape[1])
        consume = _adder(sums, own)
        backpropagate(model, layers, batch, reduction=reduction, consume=consume, members=members)
    if not sums:
        raise InputError("weights: expected at least one batch of samples, got none")
    for name, factor in (scale or {}).items():
        sums[name] *= factor.to(sums[name])
    return sums


def _zeros(layers: Sequence[Layer], count: int) -> dict[str, Tensor]:
    return {
        layer.name: torch.zeros(
            count,
            layer.out_features,
            layer.in_features,
            dtype=wide_dtype(layer.parameter.dtype),
            device=layer.parameter.device,
        )
        for layer in layers
    }


def _adder(sums: dict[str, Tensor], weights: Float[Tensor, "b r"]) -> Consumer:
    def consume(layer: Layer, terms: list[Term]) -> None:
        for formed in formed_gradients([wide(term) for term in terms]):
            _add(sums[layer.name], formed, weights, layer.parts)

    return consume


def _add(
    total: Float[Tensor, "r rows in"], formed: Formed, weights: Float[Tensor, "b r"], parts: int
) -> None:
    gradients = formed.gradients
    own = weights[formed.sample].to(gradients)
    if formed.part is None:
        # A matrix product into the sum: no temporary of the size of r gradients.
        total.flatten(1).addmm_(own.T, gradients.flatten(1).to(total.dtype))
        return
    blocks = total.view(len(total), parts, -1, total.shape[2])
    for part, rows in part_runs(formed.part):
        blocks[:, part] += torch.einsum("cr,coi->roi", own[rows], gradients[rows])
