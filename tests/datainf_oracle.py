"""DataInf by the paper's formula, one sample, layer and target at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from influence.datainf import LayerBlock


def influences_by_loops(
    G: np.ndarray, V: np.ndarray, blocks: Sequence[LayerBlock], norms: np.ndarray | None = None
) -> np.ndarray:
    """influence(k, t) for gradients of candidates (n x d) and targets (m x d).

    `norms` (n x layers) where those of the whole gradients are others than the vectors'.
    """
    G, V = np.asarray(G, np.float64), np.asarray(V, np.float64)
    found = np.zeros((len(G), len(V)))
    for layer, block in enumerate(blocks):
        g = [row[block.offset : block.offset + block.length] for row in G]
        squares = [float(x @ x) for x in g]
        if norms is not None:
            squares = [float(norm) ** 2 for norm in norms[:, layer]]
        damping = 0.1 * sum(square / block.size for square in squares) / len(g)
        for t, target in enumerate(V):
            v = target[block.offset : block.offset + block.length]
            total = np.zeros(block.length)
            for x, square in zip(g, squares, strict=True):
                total += (v - (x @ v) / (damping + square) * x) / damping
            for k, x in enumerate(g):
                found[k, t] -= (total / len(g)) @ x
    return found
