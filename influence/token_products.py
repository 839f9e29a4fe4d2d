"""What every response token's own gradient says of a direction: <g_token, u>, without any gradient.

The loss of a sample is a mean or sum of its tokens' losses, and its gradient that of the tokens'
gradients. The derivative of all tokens' losses along u is one forward-mode pass (a product with the
Jacobian), so a few directions cost a few forward passes. `max_over_tokens` is the reduction
`token_max`: a sample counts as much as the token of it that helps most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence.blocks import eval_mode
from influence.gradients.layers import Layer
from influence.gradients.per_sample import block_layout
from influence.loss import TokenBatch, response_forward, response_samples

AT_ONCE = 8
"""Directions of one pass: what the forward pass holds grows with them."""


class _Moved:
    """A model whose parameters are others for a while, as much of it as a loss needs."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._model, self._parameters = model, dict(parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._model.parameters()

    def get_output_embeddings(self) -> nn.Module:
        return self._model.get_output_embeddings()  # type: ignore[operator]

    def __call__(self, **call: object) -> object:
        return functional_call(self._model, self._parameters, (), call)


def split_directions(
    layers: Sequence[Layer], flat: Float[Tensor, "m d"]
) -> dict[str, Float[Tensor, "m ..."]]:
    """Directions in the layout of full gradients (`block_layout`) as the parameters are stored."""
    found = {}
    for layer, block in zip(layers, block_layout(layers), strict=True):
        rows = flat[:, block.offset : block.offset + layer.size]
        weight = layer.parameter
        found[layer.name] = torch.stack(
            [layer.shape.stored(row.view(block.shape), weight.shape) for row in rows]
        ).to(weight)
    return found


def token_products(
    model: nn.Module, batch: TokenBatch, directions: Mapping[str, Float[Tensor, "m ..."]]
) -> tuple[Float[Tensor, "n m"], Int[Tensor, " n"]]:
    """<g_token, u> of every response token and direction, and the sample of each token.

    `directions` have a tensor for each of some parameters, by full name; the others do not move.
    """
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].detach() for name in directions}

    def losses(moved: dict[str, Tensor]) -> Float[Tensor, " n"]:
        logits, labels, _samples = response_forward(_Moved(model, moved), batch)  # type: ignore[arg-type]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, reduction="none")

    def along(*tangents: Tensor) -> Float[Tensor, " n"]:
        named = dict(zip(directions, tangents, strict=True))
        return torch.func.jvp(losses, (values,), (named,))[1]

    # Fused attention kernels have no forward-mode derivative.
    with torch.no_grad(), eval_mode(model), sdpa_kernel(SDPBackend.MATH):
        found = torch.vmap(along, chunk_size=AT_ONCE)(*directions.values())
    device = found.device
    return found.T, response_samples(batch).to(device)


def max_over_tokens(
    products: Float[Tensor, "n m"], samples: Int[Tensor, " n"], size: int
) -> Float[Tensor, "b m"]:
    """The largest of each sample's tokens, for every direction."""
    index = samples[:, None].expand_as(products)
    start = products.new_full((size, products.shape[1]), -torch.inf)
    return start.scatter_reduce(0, index, products, "amax")
