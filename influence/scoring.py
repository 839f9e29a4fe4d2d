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
    whole: bool = False,
) -> Float[np.ndarray, "2 r m"]:
    """Inner products of projected gradients with projected targets, by each half of the projection.

    Both halves are unbiased and independent; their mean is the score. Of `whole`, unprojected
    gradients both are the exact score.
    """
    rows = unit(vectors, norm, normalize)
    if whole:
        return np.broadcast_to(rows @ targets.T, (HALVES, len(rows), len(targets)))
    return half_products(torch.from_numpy(rows), torch.from_numpy(targets)).numpy()


def random_scores(seed: int, digests: Sequence[bytes]) -> Float[np.ndarray, "n 1"]:
    """Uniform numbers in [0, 1) that depend on the seed and the row's messages alone."""
    key = seed.to_bytes(8, "little")
    drawn = [
        int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "little")
        for digest in digests
    ]
    # 53 bits: the largest integer a float64 holds exactly, so that equal scores are equal draws.
    return np.asarray([value >> 11 for value in drawn], dtype=np.float64)[:, None] / 2.0**53
