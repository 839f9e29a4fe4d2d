"""One side of a two-sided projection: random directions, in two independent halves.

A wide side is folded first: its numbers are added up in runs with random signs, which takes one
pass over them and leaves the product with the directions a fraction of its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.projection.halves import HALVES
from influence.projection.randomness import signs

# Numbers that a folded side keeps for each direction: folding adds an eighth, at most, to the
# variance of the directions, and the product with them costs 1/fold of what it did.
_KEPT_PER_DIRECTION = 8


@dataclass(frozen=True)
class Side:
    """s random directions a half; number i of a row has the place i mod w of fold i div w.

    flips: signs of the folds after the first one, (halves, folds - 1, w). base: signs of the folded
    numbers in every direction, (halves, w, s).
    """

    width: int
    flips: Float[Tensor, "halves more w"]
    base: Float[Tensor, "halves w s"]

    def project(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows halves_s"]:
        """Rows times the directions, half beside half."""
        more = self.flips.shape[1]
        if not more or x.device.type != "cpu":
            # A GPU reads the rows once either way, and would launch a kernel for each fold.
            return torch.matmul(x, self.matrix())
        flat = x.reshape(-1, self.width)
        w = self.base.shape[1]
        folded = flat.new_empty(HALVES, len(flat), w)
        for half in range(HALVES):
            first, sums = flat[:, :w], folded[half]
            for fold in range(1, more + 1):
                chunk = flat[:, fold * w : (fold + 1) * w]
                flip = self.flips[half, fold - 1, : chunk.shape[1]]
                if chunk.shape[1] < w and fold == 1:
                    sums.copy_(first)
                    first = sums
                part = sums[:, : chunk.shape[1]]
                torch.addcmul(first[:, : chunk.shape[1]], chunk, flip, out=part)
                first = sums
        projected = torch.bmm(folded, self.base)
        return projected.transpose(0, 1).reshape(*x.shape[:-1], -1)

    def rows(self, index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows halves_s"]:
        """Rows of the matrix: the projections of rows with a single one at `index`."""
        w = self.base.shape[1]
        first = self.base.new_ones(HALVES, 1, w)
        flip = torch.cat([first, self.flips], dim=1)[:, index // w, index % w]
        found = self.base[:, index % w] * flip.unsqueeze(-1)
        return found.movedim(0, -2).flatten(-2)

    def matrix(self) -> Float[Tensor, "d halves_s"]:
        """The whole map, as a matrix."""
        return self.rows(torch.arange(self.width, device=self.base.device))


def make_side(
    width: int,
    directions: int,
    purpose: tuple[object, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Side | None:
    """The directions of a side of `width` numbers; None where it is kept as it is."""
    if width <= directions:
        return None
    folds = max(1, width // (_KEPT_PER_DIRECTION * directions))
    w = -(-width // folds)
    base = torch.stack([signs((w, directions), *purpose, h) for h in range(HALVES)])
    flips = [signs((folds - 1, w), *purpose, "fold", h) for h in range(HALVES)]
    return Side(width, torch.stack(flips).to(device, dtype), base.to(device, dtype))
