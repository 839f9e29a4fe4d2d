"""Gradient of the weight of GPT-2's Conv1D: a linear layer that stores its weight as (in, out)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from influence.gradients.linear import token_factors
from influence.gradients.rule import LayerRule


def _sizes(module: nn.Module) -> tuple[int, int]:
    weight = cast(Tensor, module.weight)
    return weight.shape[1], weight.shape[0]


CONV1D = LayerRule(
    name="conv1d",
    weight=lambda module: cast(Tensor, module.weight),
    sizes=_sizes,
    present=lambda weight: weight.mT,
    factors=token_factors,
)
