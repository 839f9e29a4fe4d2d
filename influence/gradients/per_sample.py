"""Exact norms, exact inner products, and projected or full vectors of per-sample gradients.

One backward pass of the summed losses (the losses of a batch's samples do not interact), after
which each layer's gradients are sums of D_i' X_i. Each layer is used up as soon as its terms
arrive, so no per-sample gradient outlives its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.backward import backpropagate, members_of
from influence.gradients.contractions import (
    Form,
    cheaper_form,
    formed_gradients,
    formed_products,
    formed_squared_norms,
    pair_products,
    squared_norms,
    wide,
)
from influence.gradients.layers import Layer
from influence.gradients.projected import Projection
from influence.gradients.term import Formed, OneHot, Term, wide_dtype
from influence.loss import Reduction, TokenBatch


@dataclass
class SampleGradients:
    """What one batch of b samples gives; everything is on the model's device.

    `norm` is |g_i| over all layers; `products[i, k]` is <g_i, G_k>, not normalised; `vectors` are
    the projected or the exact flat gradients (see `block_layout`), not normalised; `layer_norms`
    are the exact norms layer by layer, in their order.
    """

    loss: Float[Tensor, " b"]
    norm: Float[Tensor, " b"]
    vectors: Float[Tensor, "b dim"] | None
    products: Float[Tensor, "b m"] | None
    layer_norms: Float[Tensor, "b layers"] | None = None


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
    projection: Projection | None = None,
    targets: Mapping[str, Targets] | None = None,
    scale: Mapping[str, Float[Tensor, "out in"]] | None = None,
    full: bool = False,
    exact_norms: bool = True,
    layer_norms: bool = False,
    form: Form | Literal["auto"] = "auto",
) -> Engine:
    """A function from a batch to the losses, norms, vectors and products of its samples.

    `projection` fills `vectors` with projected gradients, `full` with the exact ones (meant for
    LoRA factors); `targets` fills `products`: for each layer name the matrices of one target or a
    list of several targets' (m = the number of all of them), on the model's device. Every target is
    contracted by itself: the bits of its products, and of the norms, do not depend on the others.
    `scale` multiplies every gradient entry by entry before anything else is made of it (an
    optimiser's preconditioner); layers that it does not name are left alone.
    Without `exact_norms`, which cost a quarter of a pass, norms are those of the projected vectors.
    `layer_norms` fills those of the single layers, which are always exact.
    `form` overrides the choice between the two ways to contract a layer: by cost for norms alone;
    with targets `formed` wherever a gradient is one dense term, which no number of targets makes
    much dearer than the other. Loss float32, norms and products float64, vectors float32 (float64
    for a float64 model).

    Raises InputError if both kinds of vectors are asked for, or if targets or scales do not fit.
    """
    if full and projection is not None:
        raise InputError("gradients.projection: expected a projection or full vectors, got both")
    if not layers:
        raise InputError("layers: expected at least one attributed layer, got none")
    goals = None if targets is None else _target_blocks(layers, targets)
    count = 0 if goals is None else sum(map(len, goals[layers[0].name]))
    scales = {} if scale is None else dict(scale)
    _check_scales(layers, scales)
    # Whole vectors give their exact norms at the end, in one pass over them.
    exact_norms = exact_norms or layer_norms
    from_vectors = full or (projection is not None and not exact_norms)
    exact_norms = goals is not None or not from_vectors
    members = members_of(model)
    work = _Work(projection, goals, scales, full, exact_norms, form, _offsets(layers))
    consume = _consume if not (layer_norms and exact_norms) else _consume_with_norms(layers)
    sides = {} if exact_norms else _input_sides(projection, layers, scales)

    def engine(batch: TokenBatch) -> SampleGradients:
        size = batch.input_ids.shape[0]

        def zeros(*width: int) -> Tensor:
            device = layers[0].parameter.device
            return torch.zeros(size, *width, dtype=torch.float64, device=device)

        sums = SampleGradients(
            loss=torch.empty(0),
            norm=zeros(),
            vectors=_accumulator(projection, full, layers, size),
            products=None if targets is None else zeros(count),
            layer_norms=zeros(len(layers)) if layer_norms else None,
        )
        losses = backpropagate(
            model,
            layers,
            batch,
            reduction=reduction,
            consume=lambda layer, terms: consume(work, sums, layer, terms),
            members=members,
            input_sides=sides,
        )
        sums.loss, sums.norm = losses.float(), sums.norm.sqrt()
        if not exact_norms and sums.vectors is not None:
            sums.norm = _row_norms(sums.vectors)
        if sums.layer_norms is not None:
            _finish_layer_norms(sums, layers, from_vectors=not exact_norms)
        return sums

    return engine


@dataclass(frozen=True)
class _Work:
    """What an engine makes of every layer; see `make_engine`."""

    projection: Projection | None
    targets: Mapping[str, list[Tensor]] | None
    scale: Mapping[str, Tensor]
    full: bool
    exact_norms: bool
    form: Form | Literal["auto"]
    offsets: dict[str, int]


def _consume(work: _Work, sums: SampleGradients, layer: Layer, terms: Sequence[Term]) -> None:
    """Add one layer in the precision of the sums."""
    wider = [wide(term) for term in terms]
    first = wider[0]
    only_formed = work.full and not work.exact_norms and layer.name not in work.scale
    if only_formed and len(wider) == 1 and first.whole and isinstance(first.d, Tensor):
        assert sums.vectors is not None
        _form_in_place(sums.vectors, first.x, first.d, work.offsets[layer.name])
    else:
        _add_layer(work, sums, layer, wider)


def _consume_with_norms(layers: Sequence[Layer]) -> Callable[..., None]:
    """`_consume`, which also keeps each layer's part of the squared norms."""
    place = {layer.name: index for index, layer in enumerate(layers)}

    def consume(work: _Work, sums: SampleGradients, layer: Layer, terms: Sequence[Term]) -> None:
        own = replace(sums, norm=torch.zeros_like(sums.norm))
        _consume(work, own, layer, terms)
        sums.norm += own.norm
        assert sums.layer_norms is not None
        sums.layer_norms[:, place[layer.name]] += own.norm

    return consume


def _finish_layer_norms(
    sums: SampleGradients, layers: Sequence[Layer], *, from_vectors: bool
) -> None:
    assert sums.layer_norms is not None
    if not from_vectors:
        sums.layer_norms.sqrt_()  # until now squares
        return
    assert sums.vectors is not None
    for index, block in enumerate(block_layout(layers)):
        own = sums.vectors[:, block.offset : block.offset + block.shape[0] * block.shape[1]]
        sums.layer_norms[:, index] = torch.linalg.vector_norm(own, dim=1, dtype=torch.float64)


def _form_in_place(
    vectors: Float[Tensor, "b size"],
    x: Float[Tensor, "b t in"],
    d: Float[Tensor, "b t out"],
    at: int,
) -> None:
    """D' X of every sample, written where it belongs: LoRA's factors are many and small."""
    shape = d.shape[2], x.shape[2]
    blocks = vectors[:, at : at + shape[0] * shape[1]].unflatten(1, shape)
    if len(blocks) == 1:
        torch.mm(d[0].T, x[0], out=blocks[0])
        return
    if vectors.is_cuda:
        blocks.copy_(torch.bmm(d.mT, x))
        return
    for block, left, right in zip(blocks, d, x, strict=True):
        torch.mm(left.T, right, out=block)


def _add_layer(work: _Work, sums: SampleGradients, layer: Layer, terms: Sequence[Term]) -> None:
    """Add one layer to the sums; until the end, `norm` holds squares."""
    dtype = terms[0].x.dtype
    goals = None if work.targets is None else [t.to(dtype) for t in work.targets[layer.name]]
    scale = work.scale.get(layer.name)
    projection = work.projection
    if projection is not None and projection.takes_factors and scale is None:
        assert sums.vectors is not None
        for term in terms:
            projection.add_term(layer.name, term, sums.vectors)
        if not work.exact_norms:
            return
        projection = None  # done: what follows is for the norms and products
    must_form = work.full or scale is not None or projection is not None
    if not must_form and _chosen_form(work, layer, terms, goals is not None) == "pair":
        sums.norm += squared_norms(terms, len(sums.norm))
        if goals is not None and sums.products is not None:
            size = len(sums.norm)
            sums.products += sum(
                torch.cat([pair_products(t, goal, layer.parts, size) for goal in goals], dim=1)
                for t in terms
            )
        return
    for formed in formed_gradients(terms):
        gradients = formed.gradients
        if scale is not None:
            blocks = scale.to(dtype).view(layer.parts, -1, layer.in_features)
            gradients *= blocks if formed.part is None else blocks[formed.part]
        if work.exact_norms:
            formed.add_by_sample(sums.norm, formed_squared_norms(gradients))
        if goals is not None and sums.products is not None:
            parts = [formed_products(formed, goal) for goal in goals]
            formed.add_by_sample(sums.products, torch.cat(parts, dim=1))
        if sums.vectors is None:
            continue
        if projection is not None:
            projection.add_formed(layer.name, formed, sums.vectors)
        elif work.full:
            _place(sums.vectors, formed, layer, work.offsets[layer.name])


def _chosen_form(work: _Work, layer: Layer, terms: Sequence[Term], with_targets: bool) -> Form:
    if work.form != "auto":
        return work.form
    overlapping = len(terms) > 1 and terms[0].whole
    if overlapping or isinstance(terms[0].d, OneHot):
        return "pair"
    if with_targets:
        return "formed"
    return cheaper_form(terms[0].x.shape[1], layer.shape.out, layer.in_features)


def _place(vectors: Tensor, formed: Formed, layer: Layer, start: int) -> None:
    """Copy formed gradients to their places in full vectors."""
    flat = formed.gradients.flatten(1)
    if formed.part is None:
        vectors[formed.sample, start : start + layer.size] = flat
        return
    blocks = vectors[:, start : start + layer.size].view(len(vectors), layer.parts, -1)
    blocks[formed.sample, formed.part] = flat


def _accumulator(
    projection: Projection | None, full: bool, layers: Sequence[Layer], size: int
) -> Tensor | None:
    if projection is not None:
        return projection.accumulator(size)
    if not full:
        return None
    weight = layers[0].parameter
    width = sum(each.size for each in layers)
    return torch.zeros(size, width, dtype=wide_dtype(weight.dtype), device=weight.device)


def _input_sides(
    projection: Projection | None, layers: Sequence[Layer], scales: Mapping[str, Tensor]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layers that nothing but the projection takes part in, whose inputs need not be kept."""
    if projection is None or not projection.takes_factors:
        return {}
    sides = {each.name: projection.input_side(each.name) for each in layers}
    return {n: side for n, side in sides.items() if side is not None and n not in scales}


def _row_norms(vectors: Float[Tensor, "b size"]) -> Float[Tensor, " b"]:
    """Norms in float64, one row after the other: full vectors are too long for a copy of all."""
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in vectors])


def _offsets(layers: Sequence[Layer]) -> dict[str, int]:
    return {block.name: block.offset for block in block_layout(layers)}


def _check_scales(layers: Sequence[Layer], scale: Mapping[str, Tensor]) -> None:
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers}
    for name, value in scale.items():
        if shapes.get(name) != tuple(value.shape):
            raise InputError(
                f"optimizer.state: expected scales of shape {shapes.get(name)} for {name}, got "
                f"{tuple(value.shape)}"
            )


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
