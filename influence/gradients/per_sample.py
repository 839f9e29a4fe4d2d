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
Targets = Float[Tensor, "m out in"] | Sequence[Float[Tensor, "_ out in"]]


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
    targets: Mapping[str, Targets] | None = None,
    full: bool = False,
    form: Form | Literal["auto"] = "auto",
) -> Engine:
    """A function from a batch to the losses, norms, vectors and products of its samples.

    `sketch` fills `vectors` with sketched gradients, `full` with the exact ones (meant for LoRA
    factors); `targets` fills `products`: for each layer name the matrices of one target or a list
    of several targets' (m = the number of all of them), on the model's device. Every target is
    contracted by itself: the bits of its products, and of the norms, do not depend on the others.
    `form` overrides the choice between the two ways to contract a layer: by cost for norms alone;
    with targets always `formed`, which no number of targets makes much dearer than the other.
    Loss float32, norms and products float64, vectors float32 (float64 for a float64 model).

    Raises InputError if both kinds of vectors are asked for, or if the targets do not fit.
    """
    if full and sketch is not None:
        raise InputError("gradients.projection: expected a sketch or full vectors, got both")
    if not layers:
        raise InputError("layers: expected at least one attributed layer, got none")
    blocks = None if targets is None else _target_blocks(layers, targets)
    count = 0 if blocks is None else sum(map(len, blocks[layers[0].name]))
    work = _Work(sketch, blocks, full, form, _offsets(layers))

    def engine(batch: TokenBatch) -> SampleGradients:
        size = batch.input_ids.shape[0]
        weight = layers[0].rule.weight(layers[0].module)
        sums = SampleGradients(
            loss=torch.empty(0),
            norm=torch.zeros(size, dtype=torch.float64, device=weight.device),
            vectors=_accumulator(sketch, full, layers, size),
            products=None
            if targets is None
            else torch.zeros(size, count, dtype=torch.float64, device=weight.device),
        )
        losses = backpropagate(
            model,
            layers,
            batch,
            reduction=reduction,
            consume=lambda layer, x, d: _add_layer(work, sums, layer, wide(x), wide(d)),
        )
        sums.loss, sums.norm = losses.float(), sums.norm.sqrt()
        return sums

    return engine


@dataclass(frozen=True)
class _Work:
    """What an engine makes of every layer; see `make_engine`."""

    sketch: Sketch | None
    targets: Mapping[str, list[Tensor]] | None
    full: bool
    form: Form | Literal["auto"]
    offsets: dict[str, int]


def _add_layer(
    work: _Work,
    sums: SampleGradients,
    layer: Layer,
    x: Float[Tensor, "b t in"],
    d: Float[Tensor, "b t out"],
) -> None:
    """Add one layer to the sums; until the end, `norm` holds squares."""
    goals = None if work.targets is None else [t.to(x.dtype) for t in work.targets[layer.name]]
    if work.sketch is not None and sums.vectors is not None:
        work.sketch.apply_layer(layer.name, x, d, sums.vectors)
    chosen = work.form
    if chosen == "auto":
        alone = cheaper_form(x.shape[1], layer.out_features, layer.in_features)
        chosen = alone if goals is None else "formed"
    if chosen == "pair" and not work.full:
        sums.norm += pair_squared_norms(x, d)
        if goals is not None and sums.products is not None:
            sums.products += torch.cat([pair_products(x, d, goal) for goal in goals], dim=1)
        return
    for rows, gradients in formed_gradients(x, d):
        sums.norm[rows] += formed_squared_norms(gradients)
        if goals is not None and sums.products is not None:
            parts = [formed_products(gradients, goal) for goal in goals]
            sums.products[rows] += torch.cat(parts, dim=1)
        if work.full and sums.vectors is not None:
            start = work.offsets[layer.name]
            sums.vectors[rows, start : start + layer.size] = gradients.flatten(1)


def _accumulator(
    sketch: Sketch | None, full: bool, layers: Sequence[Layer], size: int
) -> Tensor | None:
    if sketch is not None:
        return sketch.accumulator(size)
    if not full:
        return None
    weight = layers[0].rule.weight(layers[0].module)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(size, sum(each.size for each in layers), dtype=dtype, device=weight.device)


def _offsets(layers: Sequence[Layer]) -> dict[str, int]:
    return {block.name: block.offset for block in block_layout(layers)}


def _target_blocks(
    layers: Sequence[Layer], targets: Mapping[str, Targets]
) -> dict[str, list[Tensor]]:
    names = {layer.name for layer in layers}
    if names != set(targets):
        odd = sorted(names ^ set(targets))[:3]
        raise InputError(
            f"targets: expected the gradients of exactly the attributed layers, but {odd} "
            "are on one side only; compute the targets with the same layers"
        )
    blocks = {
        name: [each] if isinstance(each, Tensor) else list(each) for name, each in targets.items()
    }
    counts = [len(block) for block in blocks[layers[0].name]]
    for layer in layers:
        expected = [(count, layer.out_features, layer.in_features) for count in counts]
        shapes = [tuple(block.shape) for block in blocks[layer.name]]
        if shapes != expected:
            raise InputError(
                f"targets: expected shapes {expected} for layer {layer.name}, got {shapes}"
            )
    return blocks
