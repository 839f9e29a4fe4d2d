"""Scores out of shards: exact ones from gradients or inner products, predicted ones from landmarks.

Pure arithmetic on arrays; `influence.reducer` reads the shards and decides what is asked of whom.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from influence.projection import HALVES, half_products
from influence.schemas import VectorLayout


@dataclass(frozen=True)
class ExactScores:
    """Scores from gradients: P (r x m), and the two halves of a sketch (2 x r x m) or None."""

    P: Float[np.ndarray, "r m"]
    halves: Float[np.ndarray, "2 r m"] | None


def unit(
    vectors: Float[np.ndarray, "n d"], norm: Float[np.ndarray, "n"], normalize: bool
) -> Float[np.ndarray, "n d"]:
    """Rows divided by their norms, in float64.

    Of a projected row that may be the projection's own norm: its error is that of the inner
    products in part, which cancels. For a correlation rho and k random numbers the variance of a
    cosine is (1 - rho^2)^2 / k so, and (1 + rho^2) / k with the norms of the whole gradients.
    """
    vectors = vectors.astype(np.float64)
    return vectors / norm[:, None] if normalize else vectors


def usable_norm(norm: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Rows whose gradient or embedding is finite and not zero."""
    return np.isfinite(norm) & (norm > 0)


def sketched_halves(
    vectors: Float[np.ndarray, "r d"],
    norm: Float[np.ndarray, "r"],
    targets: Float[np.ndarray, "m d"],
    normalize: bool,
    *,
    layout: VectorLayout | None = None,
) -> Float[np.ndarray, "2 r m"]:
    """Inner products of projected gradients with projected targets, by each half of the projection.

    Both halves are unbiased and independent; their mean is the score. Of unprojected gradients both
    are the exact score. `layout`: that of the vectors, where they are not simply two halves.
    """
    rows = unit(vectors, norm, normalize)
    if layout is not None and layout.whole:
        return np.broadcast_to(rows @ targets.T, (HALVES, len(rows), len(targets)))
    if layout is not None and layout.blocks:
        return np.stack([(rows * weights) @ targets.T for weights in half_weights(layout)])
    return half_products(torch.from_numpy(rows), torch.from_numpy(targets)).numpy()


def half_weights(layout: VectorLayout) -> Float[np.ndarray, "2 d"]:
    """What each half's estimate weighs every column with, where layers are projected one by one.

    A projected layer's columns are its two halves, each of which counts twice in its own estimate;
    those of a layer that is whole count once in both.
    """
    weights = np.ones((HALVES, layout.dim))
    for (_name, offset, length), size in zip(layout.blocks, layout.sizes, strict=True):
        if length < size:
            middle = offset + length // HALVES
            weights[0, offset:middle], weights[0, middle : offset + length] = HALVES, 0.0
            weights[1, offset:middle], weights[1, middle : offset + length] = 0.0, HALVES
    return weights


def random_scores(seed: int, digests: Sequence[bytes]) -> Float[np.ndarray, "n 1"]:
    """Uniform numbers in [0, 1) that depend on the seed and the row's messages alone."""
    key = seed.to_bytes(8, "little")
    drawn = [
        int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "little")
        for digest in digests
    ]
    # 53 bits: the largest integer a float64 holds exactly, so that equal scores are equal draws.
    return np.asarray([value >> 11 for value in drawn], dtype=np.float64)[:, None] / 2.0**53
