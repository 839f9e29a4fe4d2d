"""Rows of a tall factor in blocks: the products that the quadratic programme needs, in float64.

The factor may be float32 and large: it is converted a block at a time, and only a small set of
rows (a working set) is kept in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import numpy as np
from jaxtyping import Float, Int

BLOCK_ELEMENTS = 1 << 20
HELD_ELEMENTS = 1 << 26


class FactorRows:
    """Some rows i of F = scale * factor with their linear gains c_i.

    `index` are positions in the factor (None: all of them). Positions in the methods are local:
    0..len-1, in the order of `index`. Rows that take at most 512 MiB in float64 are held, more are
    read from the factor anew for every product.
    """

    def __init__(
        self,
        c: Float[np.ndarray, " n"],
        factor: Float[np.ndarray, "n r"],
        scale: float,
        index: Int[np.ndarray, " w"] | None = None,
    ) -> None:
        self.index = index
        self.scale = scale
        self.c = c if index is None else c[index]
        self.rank = factor.shape[1]
        self._factor = factor
        self._held: np.ndarray | None = None
        self._reach: float | None = None
        self._hold()

    def __len__(self) -> int:
        return len(self.c)

    def only(self, kept: Int[np.ndarray, " k"]) -> FactorRows:
        """These rows alone, in this order."""
        smaller = copy(self)
        smaller.index = kept if self.index is None else self.index[kept]
        smaller.c = self.c[kept]
        smaller._reach = None
        smaller._held = None if self._held is None else self._held[kept]
        smaller._hold()
        return smaller

    def _hold(self) -> None:
        small = self.index is not None and len(self.index) * self.rank <= HELD_ELEMENTS
        if small and self._held is None:
            self._held = self._factor[self.index].astype(np.float64, copy=False)

    def rows(self, positions: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k r"]:
        """Unscaled rows of the factor in float64."""
        if self._held is not None:
            return self._held[positions]
        where = positions if self.index is None else self.index[positions]
        return self._factor[where].astype(np.float64, copy=False)

    def _blocks(
        self, positions: Int[np.ndarray, " k"] | None
    ) -> Iterator[tuple[slice, Float[np.ndarray, "b r"]]]:
        count = len(self) if positions is None else len(positions)
        step = max(1, BLOCK_ELEMENTS // max(1, self.rank))
        if positions is None and self._held is not None:
            step = max(1, count)
        for first in range(0, count, step):
            part = slice(first, min(count, first + step))
            if positions is not None:
                yield part, self.rows(positions[part])
            elif self._held is not None:
                yield part, self._held[part]
            else:
                where = part if self.index is None else self.index[part]
                yield part, self._factor[where].astype(np.float64, copy=False)

    def times(self, z: Float[np.ndarray, " r"]) -> Float[np.ndarray, " w"]:
        """F z."""
        found = np.empty(len(self))
        scaled = self.scale * z
        for part, block in self._blocks(None):
            found[part] = block @ scaled
        return found

    def gains(self, z: Float[np.ndarray, " r"]) -> Float[np.ndarray, " w"]:
        """c - F z: every row's gain before the penalty and the multiplier are taken off."""
        return self.c - self.times(z)

    def adjoint(
        self,
        positions: Int[np.ndarray, " k"],
        w: Float[np.ndarray, " k"],
        *,
        scaled: bool = True,
    ) -> Float[np.ndarray, " r"]:
        """F' w of the rows at these positions; of the factor itself with scaled=False."""
        total = np.zeros(self.rank)
        for part, block in self._blocks(positions):
            total += w[part] @ block
        return self.scale * total if scaled else total

    def gram(
        self, positions: Int[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, "r r"], Float[np.ndarray, " r"]]:
        """(F'F, F'1) of the rows at these positions."""
        product, ones = np.zeros((self.rank, self.rank)), np.zeros(self.rank)
        for _, block in self._blocks(positions):
            product += block.T @ block
            ones += block.sum(axis=0)
        return self.scale**2 * product, self.scale * ones

    def reach(self) -> float:
        """The largest Euclidean norm of a row of F."""
        if self._reach is None:
            squares = [
                float(np.einsum("ij,ij->i", b, b).max()) for _, b in self._blocks(None) if b.size
            ]
            self._reach = self.scale * float(np.sqrt(max(squares, default=0.0)))
        return self._reach


class ActiveGram:
    """The Gram matrix of the active rows, kept up by the rows that come and go.

    Only the direction of a Newton step rests on it, so the rounding of some updates does no harm;
    it is made anew where the changes would cost as much. `steps` counts the Newton steps it served.
    """

    RENEW_AFTER = 25

    def __init__(self, rows: FactorRows) -> None:
        self._rows = rows
        self._active = np.zeros(0, dtype=np.int64)
        self._gram = np.zeros((rows.rank, rows.rank))
        self._ones = np.zeros(rows.rank)
        self._updates = 0
        self.steps = 0

    def of(
        self, active: Int[np.ndarray, " k"]
    ) -> tuple[Float[np.ndarray, "r r"], Float[np.ndarray, " r"]]:
        """(F_A'F_A, F_A'1) of the active rows A (sorted positions)."""
        self.steps += 1
        entering = np.setdiff1d(active, self._active, assume_unique=True)
        leaving = np.setdiff1d(self._active, active, assume_unique=True)
        changes = len(entering) + len(leaving)
        if 2 * changes >= len(active) or self._updates >= self.RENEW_AFTER:
            self._gram, self._ones = self._rows.gram(active)
            self._updates = 0
        elif changes:
            for sign, part in ((1.0, entering), (-1.0, leaving)):
                if len(part):
                    gram, ones = self._rows.gram(part)
                    self._gram, self._ones = self._gram + sign * gram, self._ones + sign * ones
            self._updates += 1
        self._active = active
        return self._gram, self._ones
