"""Scores at several checkpoints, added up with weights; of rows that have one at each of them.

A row without a score at some checkpoint has none: a sum over the others would be of another size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.score_table import ScoreBlock, ScoreTable

Part = tuple[float, Int[np.ndarray, " r"], Float[np.ndarray, "*k r m"]]


def weighted_sum(
    parts: Iterable[Part],
) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, "*k r m"]]:
    """(positions, sum_j w_j P_j) over (w_j, positions, P_j), every one's positions increasing.

    Raises ValueError for no parts.
    """
    where: np.ndarray | None = None
    total = np.empty(0)
    for weight, positions, P in parts:
        own = weight * P
        if where is None:
            where, total = positions, own
            continue
        if not np.array_equal(where, positions):
            where, left, right = np.intersect1d(
                where, positions, assume_unique=True, return_indices=True
            )
            total, own = total[..., left, :], own[..., right, :]
        total = total + own
    if where is None:
        raise ValueError("no parts to add up")
    return where, total


@dataclass(frozen=True)
class SumTable:
    """The weighted sum of tables whose blocks are of the same rows, in the same order."""

    weights: Sequence[float]
    tables: Sequence[ScoreTable]

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return self.tables[0].size

    @property
    def columns(self) -> int:
        """Scores of a row."""
        return self.tables[0].columns

    def blocks(self) -> Iterator[ScoreBlock]:
        """The tables' blocks, one of each at a time; these scores are no predictions."""
        for blocks in zip(*(table.blocks() for table in self.tables), strict=True):
            parts = zip(self.weights, blocks, strict=True)
            positions, P = weighted_sum((w, block.positions, block.P) for w, block in parts)
            yield ScoreBlock(positions, P, np.zeros(len(positions)))
