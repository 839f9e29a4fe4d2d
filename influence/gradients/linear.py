"""Gradient of the weight of nn.Linear; LoRA's A and B factors are such layers, too."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.rule import Factors, LayerRule


def by_sample(x: Tensor, batch_size: int, tokens: int) -> Float[Tensor, "b t d"]:
    """`x` with one row of tokens per sample, from (b, ..., d), or from (b * t, d) flattened.

    Raises InputError if the rows cannot be told apart by sample.
    """
    if x.ndim >= 3 and x.shape[0] == batch_size:
        return x.reshape(batch_size, -1, x.shape[-1])
    if x.ndim == 2 and x.shape[0] == batch_size * tokens:
        return x.view(batch_size, tokens, x.shape[-1])
    raise InputError(
        f"a layer was called with shape {tuple(x.shape)} in a batch of {batch_size} samples of "
        f"{tokens} tokens, so its rows cannot be assigned to samples (routed experts?); "
        "leave it out with the `layers` key"
    )


def token_factors(module: nn.Module, x: Tensor, d: Tensor, batch_size: int) -> Factors:
    """X and D of y = x W' at every token: the weight gradient of sample i is D_i' X_i."""
    del module
    tokens = x.shape[0] // batch_size if x.ndim == 2 else x.shape[1]
    return by_sample(x, batch_size, tokens), by_sample(d, batch_size, tokens)


def _sizes(module: nn.Module) -> tuple[int, int]:
    linear = cast(nn.Linear, module)
    return linear.out_features, linear.in_features


LINEAR = LayerRule(
    name="linear",
    weight=lambda module: cast(Tensor, module.weight),
    sizes=_sizes,
    present=lambda weight: weight,
    factors=token_factors,
)
