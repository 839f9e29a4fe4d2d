"""Kernels between embeddings: laplace, rbf, linear and cosine, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Kernel = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def squared_distances(
    x: Float[np.ndarray, "n e"], z: Float[np.ndarray, "l e"]
) -> Float[np.ndarray, "n l"]:
    """|x_i - z_j|^2 from one matrix product, never negative."""
    # Distances do not change under a common shift, but the cancellation in |x|^2 - 2xz + |z|^2
    # does: hidden states share a large mean, which would eat most digits of a small distance.
    centre = z.mean(axis=0)
    x, z = x - centre, z - centre
    squared = -2.0 * (x @ z.T)
    squared += np.einsum("ij,ij->i", x, x)[:, None]
    squared += np.einsum("ij,ij->i", z, z)[None, :]
    return np.maximum(squared, 0.0, out=squared)


def median_distance(x: Float[np.ndarray, "l e"]) -> float:
    """The median Euclidean distance over pairs of different rows.

    Pairs of equal rows are left out only where more than half of all pairs are equal (their median
    would be no scale); where all rows are equal the answer is 1, any scale being as good.
    """
    distances = np.sqrt(squared_distances(x, x)[np.triu_indices(len(x), k=1)])
    median = float(np.median(distances))
    # What is left of a distance between equal rows is rounding, relative to the rows' spread.
    noise = 1e-6 * float(distances.max(initial=0.0))
    if median > noise:
        return median
    apart = distances[distances > noise]
    return float(np.median(apart)) if apart.size else 1.0


def rbf(
    x: Float[np.ndarray, "n e"], z: Float[np.ndarray, "l e"], bandwidth: float
) -> Float[np.ndarray, "n l"]:
    """exp(-|x - z|^2 / (2 bandwidth^2))."""
    squared = squared_distances(x, z)
    squared *= -0.5 / bandwidth**2
    return np.exp(squared, out=squared)


def laplace(
    x: Float[np.ndarray, "n e"], z: Float[np.ndarray, "l e"], bandwidth: float
) -> Float[np.ndarray, "n l"]:
    """exp(-|x - z| / bandwidth), also known as the exponential or Matern-1/2 kernel."""
    distances = squared_distances(x, z)
    np.sqrt(distances, out=distances)
    distances *= -1.0 / bandwidth
    return np.exp(distances, out=distances)


def linear(
    x: Float[np.ndarray, "n e"], z: Float[np.ndarray, "l e"], bandwidth: float
) -> Float[np.ndarray, "n l"]:
    """<x, z>; `bandwidth` is not used."""
    del bandwidth
    return x @ z.T


def cosine(
    x: Float[np.ndarray, "n e"], z: Float[np.ndarray, "l e"], bandwidth: float
) -> Float[np.ndarray, "n l"]:
    """<x, z> / (|x| |z|), 0 where a row is zero; `bandwidth` is not used."""
    del bandwidth
    return unit_rows(x) @ unit_rows(z).T


def unit_rows(x: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
    """Rows of length 1; a zero row stays zero."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)


KERNELS: dict[str, Kernel] = {
    "laplace": laplace,
    "rbf": rbf,
    "linear": linear,
    "cosine": cosine,
}
# Those that measure distances in units of a bandwidth.
WITH_BANDWIDTH = ("laplace", "rbf")


def bandwidth_of(kernel: str, x: Float[np.ndarray, "l e"]) -> float:
    """The median distance between rows for the kernels that have a bandwidth, else 1."""
    return median_distance(x) if kernel in WITH_BANDWIDTH else 1.0


def diagonal(kernel: str, x: Float[np.ndarray, "n e"]) -> Float[np.ndarray, " n"]:
    """k(x_i, x_i) of every row."""
    squared = np.einsum("ij,ij->i", x, x)
    if kernel == "linear":
        return squared
    return (squared > 0).astype(np.float64) if kernel == "cosine" else np.ones(len(x))
