"""Products with random signs / sqrt(k), made tile by tile and never kept.

The densest of the projections and the slowest on wide layers: every number of a gradient meets k
signs. Meant for LoRA factors and for plain vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from influence.projection.formed import FormedProjection
from influence.projection.halves import HALVES, LayerShape, check_distinct, check_even
from influence.projection.randomness import signs

TILE_ROWS = 256


def rademacher_projection(x: Float[Tensor, "n d"], dim: int, seed: int) -> Float[Tensor, "n k"]:
    """Product of each row with a d x dim matrix of signs / sqrt(dim), made tile by tile.

    Keeps inner products on average. Rows of at most `dim` numbers stay as they are (k = d).
    """
    return x if x.shape[1] <= dim else _signed_sums(x, dim, (seed, "rademacher")).mul_(dim**-0.5)


def _signed_sums(
    x: Float[Tensor, "n d"], dim: int, purpose: tuple[object, ...]
) -> Float[Tensor, "n dim"]:
    total = x.new_zeros(len(x), dim)
    for tile, start in enumerate(range(0, x.shape[1], TILE_ROWS)):
        part = x[:, start : start + TILE_ROWS]
        total.addmm_(part, signs((part.shape[1], dim), *purpose, tile).to(x))
    return total


def _project(
    seed: int, dim: int, name: str, part: int, flat: Float[Tensor, "c n"]
) -> Float[Tensor, "c dim"]:
    halves = [
        _signed_sums(flat, dim // HALVES, (seed, name, "rademacher", part, half))
        for half in range(HALVES)
    ]
    return torch.cat(halves, dim=1) * dim**-0.5


def make_rademacher(
    layers: Sequence[LayerShape],
    *,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FormedProjection:
    """The projection by random signs of these layers to `dim` numbers a row.

    Raises InputError for an odd `dim` or a repeated layer name.
    """
    check_even(dim=dim)
    check_distinct(list(layers))
    return FormedProjection(dim, dtype, torch.device(device), partial(_project, seed, dim))
