"""The rows at the head of a pool's columns: enough of them to select as if all had been seen.

Of every column (and quota group) the best rows are kept down to a bound, ties at the bound included
(`Head.complete` where nothing was left out). A selection from the kept rows alone is that of the
whole pool if, in every column and group that is not complete, a kept row at or above the bound was
left over in the end: it was free in every turn, so a row below the bound never came before it. That
can be checked afterwards; where it does not hold, more rows are kept and the selection is made
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from influence.score_table import ScoreTable

Deciding = Callable[[np.ndarray], np.ndarray]


@dataclass
class Head:
    """The best rows of one column and group: positions and scores, in no order.

    bound: every row of the group with a score of this or more is there.
    complete: so is every other row of the group.
    """

    depth: int
    positions: Int[np.ndarray, " h"] = field(default_factory=lambda: np.empty(0, np.int64))
    scores: Float[np.ndarray, " h"] = field(default_factory=lambda: np.empty(0))
    bound: float = -np.inf
    complete: bool = True

    def add(self, positions: Int[np.ndarray, " b"], scores: Float[np.ndarray, " b"]) -> None:
        """Rows of a further block (scores without NaN)."""
        near = scores >= self.bound
        if not near.all():
            self.complete = False
        self.positions = np.concatenate([self.positions, positions[near]])
        self.scores = np.concatenate([self.scores, scores[near]])
        if len(self.scores) > 2 * self.depth:
            self.cut()

    def cut(self) -> None:
        """Keep `depth` rows, and all that equal the last of them."""
        if len(self.scores) <= self.depth:
            return
        place = len(self.scores) - self.depth
        self.bound = float(np.partition(self.scores, place)[place])
        kept = self.scores >= self.bound
        if not kept.all():
            self.complete = False
        self.positions, self.scores = self.positions[kept], self.scores[kept]


def read_heads(
    table: ScoreTable,
    deciding: Deciding,
    depths: Int[np.ndarray, "c g"],
    group: Int[np.ndarray, " n"] | None = None,
) -> list[list[Head]]:
    """Heads by column and group, from one walk over the table.

    deciding: (b, m) scores -> the (b, c) scores that decide (NaN: a row without scores). depths:
    rows to keep. group: of every row of the pool, 0..g-1; None: all in group 0.
    """
    heads = [[Head(int(depth)) for depth in row] for row in depths]
    for block in table.blocks():
        scored = ~np.isnan(block.P[:, 0])
        positions, D = block.positions[scored], deciding(block.P[scored])
        of = np.zeros(len(positions), np.int64) if group is None else group[positions]
        for g in range(depths.shape[1]):
            inside = of == g
            if not inside.any():
                continue
            for c, row in enumerate(heads):
                row[g].add(positions[inside], D[inside, c])
    for row in heads:
        for head in row:
            head.cut()
    return heads


def kept_rows(heads: list[list[Head]]) -> Int[np.ndarray, " s"]:
    """All rows of all heads, once each, increasing."""
    return np.unique(np.concatenate([head.positions for row in heads for head in row]))


def short(
    heads: list[list[Head]],
    rows: Int[np.ndarray, " s"],
    D: Float[np.ndarray, "s c"],
    left: np.ndarray,
    group: Int[np.ndarray, " s"] | None,
) -> np.ndarray:
    """Which heads (c, g) were too short: no kept row at or above the bound was left over.

    rows: of the selection from the heads, with their deciding scores D, which of them are `left`,
    and their groups.
    """
    found = np.zeros((len(heads), len(heads[0])), dtype=bool)
    of = np.zeros(len(rows), np.int64) if group is None else group
    for c, row in enumerate(heads):
        for g, head in enumerate(row):
            inside = left & (of == g)
            found[c, g] = not head.complete and not (D[inside, c] >= head.bound).any()
    return found
