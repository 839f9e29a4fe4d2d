"""Every projection is two independent ones of half the length, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.errors import InputError
from influence.gradients.layers import Layer

HALVES = 2


class LayerShape(NamedTuple):
    """A layer's gradient: `parts` matrices of (out, in)."""

    name: str
    out: int
    in_: int
    parts: int = 1

    @property
    def size(self) -> int:
        return self.parts * self.out * self.in_


def layer_shapes(layers: Sequence[Layer]) -> list[LayerShape]:
    """What a projection needs to know of attributed layers."""
    return [LayerShape(x.name, x.shape.out, x.in_features, x.parts) for x in layers]


def half_products(v: Float[Tensor, "n dim"], w: Float[Tensor, "m dim"]) -> Float[Tensor, "2 n m"]:
    """The two halves' estimates of the inner products of projected rows; their mean is V W'."""
    left = v.view(len(v), HALVES, -1).transpose(0, 1)
    right = w.view(len(w), HALVES, -1).transpose(0, 1)
    return HALVES * torch.matmul(left, right.mT)


def check_even(**values: int) -> None:
    """Raise InputError unless every value is even and positive; the keys are the config's."""
    for key, value in values.items():
        if value < HALVES or value % HALVES:
            raise InputError(
                f"gradients.{key}: expected an even number of at least {HALVES} (a projection has "
                f"two independent halves), got {value}"
            )


def check_distinct(layers: list[LayerShape]) -> None:
    """Raise InputError for a repeated layer name."""
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        raise InputError("layers: expected distinct layer names, got a name twice")
