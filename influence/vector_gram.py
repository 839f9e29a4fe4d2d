"""Inner products of full vectors in shards, a few of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

Vector = Mapping[str, Float[np.ndarray, "out in"]]

BLOCK_BYTES = 4 * 10**9
"""What the vectors of the left side may take at once."""


def vector_products(
    left: Sequence[str],
    right: Sequence[Sequence[tuple[str, float]]],
    read: Callable[[str], Vector],
    limit: int = BLOCK_BYTES,
) -> Float[np.ndarray, "l r"]:
    """<left_j, right_k> in float64; a right vector is the weighted sum of some shards' vectors.

    `read` gives the vector of a key by layer. The left vectors are held in blocks of at most
    `limit` bytes (one at least), and every right one is read once for each block.
    """
    products = np.zeros((len(left), len(right)))
    start = 0
    while start < len(left):
        block: list[Vector] = []
        held = 0
        while start + len(block) < len(left):
            vector = read(left[start + len(block)])
            size = sum(each.nbytes for each in vector.values())
            if block and held + size > limit:
                break
            block.append(vector)
            held += size
        for k, parts in enumerate(right):
            for key, weight in parts:
                vector = read(key)
                for j, each in enumerate(block):
                    products[start + j, k] += weight * _dot(each, vector)
        start += len(block)
    return products


def _dot(first: Vector, second: Vector) -> float:
    """Layer by layer in float64: a float32 sum of 10^8 products would lose the small ones."""
    return sum(
        float(np.vdot(values.astype(np.float64), second[name].astype(np.float64)))
        for name, values in first.items()
    )
