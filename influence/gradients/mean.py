"""Sum of the gradients of many samples, each scaled to unit length or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.backward import Consumer, backpropagate
from influence.gradients.contractions import formed_gradients, wide
from influence.gradients.layers import Layer
from influence.gradients.per_sample import make_engine
from influence.gradients.term import OneHot, Term, wide_dtype
from influence.loss import Reduction, TokenBatch


def mean_gradient(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[TokenBatch],
    *,
    reduction: Reduction,
    normalize: bool,
    names: Sequence[Sequence[str]] | None = None,
) -> tuple[dict[str, Float[Tensor, "out in"]], int]:
    """The sum over samples of g_i (or of g_i / |g_i|) per layer name, and the number of samples.

    Divide by the count for the mean; the sum is returned so that parts of a group add up. Each
    batch takes two passes: exact norms first, then the sum, with `normalize` of output gradients
    scaled by 1 / |g_i|. Sums are float32 (float64 for a float64 model), on the model's device.
    `names` has a name for every sample of every batch, for the error.

    Raises InputError for a sample whose gradient is zero or not finite: it has no direction, and
    one such number would spoil every score.
    """
    sums = {
        layer.name: torch.zeros(
            layer.out_features,
            layer.in_features,
            dtype=wide_dtype(layer.parameter.dtype),
            device=layer.parameter.device,
        )
        for layer in layers
    }
    engine = make_engine(model, layers, reduction=reduction)

    count = 0
    for index, batch in enumerate(batches):
        norm = engine(batch).norm
        _check(norm, None if names is None else names[index], index)
        weights = norm.reciprocal() if normalize else torch.ones_like(norm)
        consume = _adder(sums, weights)
        backpropagate(model, layers, batch, reduction=reduction, consume=consume)
        count += batch.input_ids.shape[0]
    return sums, count


def _check(norm: Float[Tensor, " b"], names: Sequence[str] | None, batch: int) -> None:
    bad = (~(torch.isfinite(norm) & (norm > 0))).nonzero().flatten().tolist()
    if bad:
        name = f"sample {bad[0]} of batch {batch}" if names is None else names[bad[0]]
        raise InputError(
            f"{name}: the norm of this row's gradient is {norm[bad[0]]:g}; expected a finite one "
            "above 0: remove the row from the target (it cannot steer anything)"
        )


def _adder(sums: dict[str, Tensor], weights: Float[Tensor, " b"]) -> Consumer:
    def consume(layer: Layer, terms: list[Term]) -> None:
        for term in terms:
            _add(sums[layer.name], wide(term), weights, layer.parts)

    return consume


def _add(total: Float[Tensor, "rows in"], term: Term, weights: Tensor, parts: int) -> None:
    """Add the weighted sum over the samples of one term."""
    # Weighted here and not in the loss, where 1 / |g_i| could overflow a half-precision backward.
    owner = weights if term.sample is None else weights[term.sample]
    x = term.x * owner.to(term.x.dtype)[:, None, None]
    if term.part is not None:
        blocks = total.view(parts, -1, total.shape[1])
        for formed in formed_gradients([Term(x, term.d, term.sample, term.part)]):
            assert formed.part is not None
            blocks.index_add_(0, formed.part, formed.gradients)
    elif isinstance(term.d, OneHot):
        total.index_add_(0, term.d.index.flatten(), x.flatten(0, 1))
    else:
        total.addmm_(term.d.flatten(0, 1).mT, x.flatten(0, 1))
