"""One side of a two-sided projection: a CountSketch of its numbers, in two independent halves.

Number i of a row goes to direction i mod s with a random sign of its own (Charikar, Chen and
Farach-Colton 2002, with this instead of a random hash). Its variance, over the pairs of numbers, is
that of s dense random directions, and a row is sketched in one pass over its numbers: two numbers
either meet for certain, with an error of a random sign, or never, where in dense directions all of
them meet a little. So that the same two do not meet in every layer, s varies from side to side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.projection.halves import HALVES
from influence.projection.randomness import raw, signs


@dataclass(frozen=True)
class Side:
    """`directions` numbers a half for rows of d; flips: the sign of every number, by half."""

    directions: int
    flips: Float[Tensor, "halves d"]

    def project(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows halves_s"]:
        """The sketches of rows, half beside half."""
        if x.device.type != "cpu":
            # A GPU reads the rows once either way, and multiplies faster than it adds up.
            return torch.matmul(x, self.matrix())
        s, width = self.directions, x.shape[-1]
        folds = -(-width // s)
        flipped = x.new_empty(*x.shape[:-1], HALVES, folds * s)
        torch.mul(x.unsqueeze(-2), self.flips, out=flipped[..., :width])
        flipped.narrow(-1, width, folds * s - width).zero_()
        return flipped.unflatten(-1, (folds, s)).sum(-2).flatten(-2)

    def rows(self, index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows halves_s"]:
        """Rows of the matrix: the sketches of rows with a single one at `index`."""
        found = self.flips.new_zeros(*index.shape, HALVES, self.directions)
        place = (index % self.directions)[..., None, None].expand(*index.shape, HALVES, 1)
        flips = self.flips[:, index].movedim(0, -1).unsqueeze(-1)
        return found.scatter_(-1, place, flips).flatten(-2)

    def matrix(self) -> Float[Tensor, "d halves_s"]:
        """The whole map, as a matrix."""
        return self.rows(torch.arange(self.flips.shape[1], device=self.flips.device))


def make_side(
    width: int,
    directions: int,
    purpose: tuple[object, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Side | None:
    """The sketch of a side of `width` numbers; None where it is kept as it is.

    It has `directions` numbers on the average, from a tenth less to a tenth more. Only odd ones are
    drawn, where there are any: places in heads or blocks of a power of two do not fold onto one.
    """
    spread = directions // 10
    counts = range(directions - spread, directions + spread + 1)
    odd = [count for count in counts if count % 2] if spread else list(counts)
    count = odd[int(raw(1, *purpose, "directions")[0] % len(odd))]
    if width <= max(count, directions):
        return None
    flips = torch.stack([signs((width,), *purpose, half) for half in range(HALVES)])
    return Side(count, flips.to(device, dtype))
