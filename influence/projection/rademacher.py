"""Products with random signs / sqrt(k), made tile by tile and never kept.

The densest of the projections and the slowest on wide layers: every number of a gradient meets k
signs. Meant for LoRA factors and for plain vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence.gradients.contractions import formed_gradients
from influence.gradients.term import Formed, Term, part_runs
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


@dataclass(frozen=True)
class RademacherProjection:
    """Two halves of dim/2 sums each. Make one with `make_rademacher`."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    takes_factors: bool = False

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that each layer's part is added to."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of D' X, which is formed for it."""
        for formed in formed_gradients([term]):
            self.add_formed(name, formed, total)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of formed gradients."""
        flat = formed.gradients.to(self.dtype).flatten(1)
        if formed.part is None:
            formed.add_by_sample(total, self._project(name, 0, flat))
            return
        projected = [self._project(name, p, flat[rows]) for p, rows in part_runs(formed.part)]
        formed.add_by_sample(total, torch.cat(projected))

    def _project(self, name: str, part: int, flat: Float[Tensor, "c n"]) -> Tensor:
        k = self.dim // HALVES
        halves = [
            _signed_sums(flat, k, (self.seed, name, "rademacher", part, half))
            for half in range(HALVES)
        ]
        return torch.cat(halves, dim=1) * self.dim**-0.5


def make_rademacher(
    layers: Sequence[LayerShape],
    *,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RademacherProjection:
    """The projection by random signs of these layers to `dim` numbers a row.

    Raises InputError for an odd `dim` or a repeated layer name.
    """
    check_even(dim=dim)
    check_distinct(list(layers))
    return RademacherProjection(dim, dtype, torch.device(device), seed)
