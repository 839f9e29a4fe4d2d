"""Nystroem features: a kernel as inner products of vectors, made from a few inducing rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh

from influence.kernels import KERNELS, bandwidth_of, diagonal

# Directions of the inducing rows' kernel below this part of its largest eigenvalue are rounding.
_CUTOFF = 1e-12


@dataclass(frozen=True)
class Features:
    """phi(x) = k(x, inducing) whiten, so that phi(x)'phi(z) = k(x, z) where x or z is inducing.

    For other pairs it is the part of the kernel that the inducing rows explain (Williams and
    Seeger, NIPS 2000); k(x, x) - |phi(x)|^2, never negative, is what they do not explain.
    """

    inducing: Float[np.ndarray, "r e"]
    whiten: Float[np.ndarray, "r q"]
    kernel: str
    bandwidth: float

    @property
    def size(self) -> int:
        """Numbers in a feature vector: at most the number of inducing rows."""
        return self.whiten.shape[1]

    def cross(self, x: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n r"]:
        """k(x, inducing), in float64."""
        rows = np.asarray(x, dtype=np.float64)
        return KERNELS[self.kernel](rows, self.inducing, self.bandwidth)

    def __call__(self, x: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n q"]:
        """The feature vectors of rows of embeddings."""
        return self.cross(x) @ self.whiten

    def diagonal(self, x: Float[np.ndarray, "n e"]) -> Float[np.ndarray, " n"]:
        """k(x, x) of every row."""
        return diagonal(self.kernel, np.asarray(x, dtype=np.float64))


def make_features(
    inducing: Float[np.ndarray, "r e"], *, kernel: str, bandwidth: float | None = None
) -> Features:
    """Features from inducing rows; `bandwidth` None: by their own median distance.

    The kernel matrix is split by its eigenvectors rather than by Cholesky, so that equal or
    dependent rows only make the feature vectors shorter.
    """
    rows = np.array(inducing, dtype=np.float64)
    width = bandwidth_of(kernel, rows) if bandwidth is None else bandwidth
    gram = KERNELS[kernel](rows, rows, width)
    np.fill_diagonal(gram, diagonal(kernel, rows))
    values, vectors = eigh(gram)
    kept = values > _CUTOFF * max(float(values[-1]), np.finfo(float).tiny)
    return Features(rows, vectors[:, kept] / np.sqrt(values[kept]), kernel, width)
