"""The scores of a pool as blocks of rows: never an n x m matrix in one place.

A table hands out its blocks as often as it is asked, each time all rows once, in their order. What
needs the whole pool (a selection, a membership, the score parts) streams over the blocks and keeps
numbers for few rows, or one number for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int


class ScoreBlock(NamedTuple):
    """Rows of the pool by position, increasing, with their scores (NaN: none).

    variance: of a score that is a prediction, in units of the squared scale; 0 for an exact one.
    """

    positions: Int[np.ndarray, " b"]
    P: Float[np.ndarray, "b m"]
    variance: Float[np.ndarray, " b"]


class ScoreTable(Protocol):
    """n rows with m scores each; a row that no block holds has no score."""

    @property
    def size(self) -> int: ...

    @property
    def columns(self) -> int: ...

    def blocks(self) -> Iterator[ScoreBlock]:
        """All rows with a score, once, in the order of their positions."""
        ...


@dataclass(frozen=True)
class ArrayTable:
    """A table in memory, handed out in blocks of `step` rows."""

    P: Float[np.ndarray, "n m"]
    variance: Float[np.ndarray, " n"] | None = None
    step: int = 1 << 20

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return len(self.P)

    @property
    def columns(self) -> int:
        """Scores of a row."""
        return self.P.shape[1]

    def blocks(self) -> Iterator[ScoreBlock]:
        """Slices of the arrays."""
        for start in range(0, self.size, self.step):
            rows = slice(start, min(start + self.step, self.size))
            variance = np.zeros(rows.stop - start) if self.variance is None else self.variance[rows]
            yield ScoreBlock(np.arange(start, rows.stop), self.P[rows], variance)


@dataclass(frozen=True)
class OverlaidTable:
    """Another table with exact scores in place of predicted ones, and rows without any left out.

    positions: of the exact rows, increasing. barred: rows that have no score after all.
    """

    base: ScoreTable
    positions: Int[np.ndarray, " l"]
    Y: Float[np.ndarray, "l m"]
    barred: Int[np.ndarray, " x"]

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return self.base.size

    @property
    def columns(self) -> int:
        """Scores of a row."""
        return self.base.columns

    def blocks(self) -> Iterator[ScoreBlock]:
        """The base's blocks, changed in copies."""
        for block in self.base.blocks():
            P, variance = block.P, block.variance
            exact, place = _found(self.positions, block.positions)
            missing, _ = _found(self.barred, block.positions)
            if exact.any() or missing.any():
                P, variance = P.copy(), variance.copy()
                P[exact], variance[exact] = self.Y[place[exact]], 0.0
                P[missing] = np.nan
            yield ScoreBlock(block.positions, P, variance)


@dataclass(frozen=True)
class FirstColumns:
    """The first columns of another table."""

    base: ScoreTable
    columns: int

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return self.base.size

    def blocks(self) -> Iterator[ScoreBlock]:
        """The base's blocks, cut."""
        for block in self.base.blocks():
            yield block._replace(P=block.P[:, : self.columns])


def _found(
    wanted: Int[np.ndarray, " l"], positions: Int[np.ndarray, " b"]
) -> tuple[np.ndarray, np.ndarray]:
    """(which of the positions are among the wanted ones, their places there)."""
    if not len(wanted):
        return np.zeros(len(positions), dtype=bool), np.zeros(len(positions), dtype=np.int64)
    place = np.minimum(np.searchsorted(wanted, positions), len(wanted) - 1)
    return wanted[place] == positions, place


class Rows(NamedTuple):
    """A few rows of a table, in the order that was asked for; NaN where it holds none."""

    P: Float[np.ndarray, "r m"]
    variance: Float[np.ndarray, " r"]


def rows_of(table: ScoreTable, positions: Int[np.ndarray, " r"]) -> Rows:
    """The scores of some rows, from one walk over the table."""
    order = np.argsort(positions, kind="stable")
    wanted = positions[order]
    P = np.full((len(positions), table.columns), np.nan)
    variance = np.full(len(positions), np.nan)
    for block in table.blocks():
        if not len(block.positions):
            continue
        first, last = np.searchsorted(wanted, [block.positions[0], block.positions[-1] + 1])
        place = np.searchsorted(block.positions, wanted[first:last])
        there = block.positions[np.minimum(place, len(block.positions) - 1)] == wanted[first:last]
        into, rows = order[first:last][there], place[there]
        P[into], variance[into] = block.P[rows], block.variance[rows]
    return Rows(P, variance)


def scored_rows(table: ScoreTable) -> np.ndarray:
    """Which rows of the pool have scores (n,)."""
    found = np.zeros(table.size, dtype=bool)
    for block in table.blocks():
        found[block.positions] = ~np.isnan(block.P[:, 0])
    return found
