"""What a dense random projection of flattened gradients costs, measured on a few of its tiles."""

from __future__ import annotations

import time
from typing import Any

import torch
from gradients_protocol import Clock
from jaxtyping import Float, Int8
from torch import Tensor

from influence.projection.randomness import signs

TILE_ROWS = 256
TILES = 2


class DenseProjection:
    """The time of products with a (size, dim) matrix of random signs made tile by tile.

    The whole of it takes minutes a row for a model of 1e8 parameters, and every tile costs the
    same, so at most TILES tiles of every batch are made and multiplied; the time of the others is
    taken to be theirs.
    """

    def __init__(self, dim: int, seed: int):
        self._dim, self._seed = dim, seed
        self.reset()

    def reset(self) -> None:
        """Forget all times."""
        self._seconds, self._made, self._all = 0.0, 0, 0

    def measure(self, flat: Float[Tensor, "b size"], clock: Clock) -> None:
        """Project a batch's first tiles; meant to run while the clock is paused."""
        tiles = -(-flat.shape[1] // TILE_ROWS)
        made = min(tiles, TILES)
        total = torch.zeros(len(flat), self._dim, device=flat.device)
        clock.synchronize()
        begin = time.perf_counter()
        for tile in range(made):
            part = flat[:, tile * TILE_ROWS : (tile + 1) * TILE_ROWS].float()
            total.addmm_(part, self._signs(part.shape[1], tile, flat.device).float())
        clock.synchronize()
        self._seconds += (time.perf_counter() - begin) * tiles / made
        self._made, self._all = self._made + made, self._all + tiles

    def _signs(self, rows: int, tile: int, device: torch.device) -> Int8[Tensor, "rows dim"]:
        """By the faster way of each device: packed bits on the CPU, torch's generator on a GPU."""
        shape = (rows, self._dim)
        if device.type == "cpu":
            return signs(shape, self._seed, "dense", tile)
        return torch.randint(0, 2, shape, dtype=torch.int8, device=device).mul_(2).sub_(1)

    def answer(self) -> dict[str, Any]:
        """Seconds of the projection of everything, and which share of it was really made."""
        return {
            "projection_seconds": self._seconds,
            "projection_measured_share": self._made / max(1, self._all),
            "values_per_row": self._dim,
        }
