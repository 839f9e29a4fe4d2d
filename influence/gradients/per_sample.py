"""Exact norms, exact inner products, and sketched or full vectors of per-sample gradients.

One backward pass of the summed losses (the losses of a batch's samples do not interact), after
which the weight gradient of sample i in a layer with inputs X and output gradients D is D_i' X_i.
Each layer is used up as soon as its D arrives, so no per-sample gradient outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.backward import backpropagate
from influence.gradients.contractions import (
    Form,
    cheaper_form,
    formed_gradients,
    formed_products,
    formed_squared_norms,
    pair_products,
    pair_squared_norms,
    wide,
)
from influence.gradients.layers import Layer
from influence.loss import Reduction, TokenBatch
from influence.projection import Sketch


@dataclass
class SampleGradients:
    """What one batch of b samples gives; everything is on the model's device.

    `norm` is |g_i| over all layers; `products[i, k]` is <g_i, G_k>, not normalised; `vectors` are
    the sketches or the exact flat gradients (see `block_layout`), not normalised.
    """

    loss: Float[Tensor, " b"]
    norm: Float[Tensor, " b"]
    vectors: Float[Tensor, "b dim"] | None
    products: Float[Tensor, "b m"] | None


@dataclass(frozen=True)
class Block:
    """Where a layer's (out, in) gradient lies, row by row, in a full flat vector."""

    name: str
    offset: int
    shape: tuple[int, int]


Engine = Callable[[TokenBatch], SampleGradients]


def block_layout(layers: Sequence[Layer]) -> list[Block]:
    """The layout of full vectors: the layers in their order, each gradient (out, in) row-major."""
    blocks, offset = [], 0
    for layer in layers:
        blocks.append(Block(layer.name, offset, (layer.out_features, layer.in_features)))
        offset += layer.size
    return blocks


def make_engine(
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    reduction: Reduction,
    sketch: Sketch | None = None,
    targets: Mapping[str, Float[Tensor, "m out in"]] | None = None,
    full: bool = False,
    form: Form | Literal["auto"] = "auto",
) -> Engine:
    """A function from a batch to the losses, norms, vectors and products of its samples.

    `sketch` fills `vectors` with sketched gradients, `full` with the exact ones (meant for LoRA
    factors); `targets` (one (m, out, in) tensor per layer name, on the model's device) fills
    `products`. `form` overrides the choice by cost between the two ways to contract a layer.
    Loss float32, norms and products float64, vectors float32 (float64 for a float64 model).

    Raises InputError if both kinds of vectors are asked for, or if the targets do not fit.
    """
    if full and sketch is not None:
        raise InputError("gradients.projection: expected a sketch or full vectors, got both")
    if not layers:
        raise InputError("layers: expected at least one attributed layer, got none")
    count = 0 if targets is None else _target_count(layers, targets)
    offsets = {block.name: block.offset for block in block_layout(layers)}
    total_size = sum(layer.size for layer in layers)

    def engine(batch: TokenBatch) -> SampleGradients:
        size = batch.input_ids.shape[0]
        weight = layers[0].rule.weight(layers[0].module)
        device = weight.device
        squared = torch.zeros(size, dtype=torch.float64, device=device)
        products = torch.zeros(size, count, dtype=torch.float64, device=device)
        vectors: Tensor | None = None
        if sketch is not None:
            vectors = sketch.accumulator(size)
        elif full:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            vectors = torch.zeros(size, total_size, dtype=dtype, device=device)

        def consume(layer: Layer, x: Tensor, d: Tensor) -> None:
            x, d = wide(x), wide(d)
            goal = None if targets is None else targets[layer.name].to(x.dtype)
            if sketch is not None and vectors is not None:
                sketch.apply_layer(layer.name, x, d, vectors)
            chosen = form
            if form == "auto":
                chosen = cheaper_form(x.shape[1], layer.out_features, layer.in_features, count)
            if chosen == "pair" and not full:
                squared.add_(pair_squared_norms(x, d))
                if goal is not None:
                    products.add_(pair_products(x, d, goal))
                return
            for rows, gradients in formed_gradients(x, d):
                squared[rows] += formed_squared_norms(gradients)
                if goal is not None:
                    products[rows] += formed_products(gradients, goal)
                if full and vectors is not None:
                    start = offsets[layer.name]
                    vectors[rows, start : start + layer.size] = gradients.flatten(1)

        losses = backpropagate(model, layers, batch, reduction=reduction, consume=consume)
        return SampleGradients(
            loss=losses.float(),
            norm=squared.sqrt(),
            vectors=vectors,
            products=None if targets is None else products,
        )

    return engine


def _target_count(layers: Sequence[Layer], targets: Mapping[str, Tensor]) -> int:
    names = {layer.name for layer in layers}
    if names != set(targets):
        odd = sorted(names ^ set(targets))[:3]
        raise InputError(
            f"targets: expected the gradients of exactly the attributed layers, but {odd} "
            "are on one side only; compute the targets with the same layers"
        )
    count = len(targets[layers[0].name])
    for layer in layers:
        expected = (count, layer.out_features, layer.in_features)
        if tuple(targets[layer.name].shape) != expected:
            raise InputError(
                f"targets: expected shape {expected} for layer {layer.name}, "
                f"got {tuple(targets[layer.name].shape)}"
            )
    return count
