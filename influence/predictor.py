"""What turns embeddings into predicted scores, as a file that every replica can read.

A fitted regression, a process after its observations and the mean embeddings of RDS+ all come down
to the same arithmetic, P = k(X, centres) A + b, and for a process the variance
k(x, x) - |k(x, centres) S|^2 + ridge. So the map over the pool's embeddings knows nothing of how
they were made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped

from influence.array_files import digest_of, read_arrays, write_arrays
from influence.errors import InputError
from influence.landmarks import LandmarkRegression
from influence.posterior import Posterior

# Kernel values of one block: 2^20 float32 are 4 MiB, which stay in a core's cache.
_BLOCK_ENTRIES = 1 << 20
# Of vectors that are wider still: a row alone would read all centres for itself.
_LEAST_ROWS = 64


class Predicted(NamedTuple):
    """Scores in float64, and their variances in units of the squared scale (0 where unknown)."""

    P: Float[np.ndarray, "b m"]
    variance: Float[np.ndarray, " b"]


@dataclass(frozen=True)
class Predictor:
    """P = k(x, centres) to_mean + mean; with `to_spread` also a variance.

    lengths: whether the embeddings come with their lengths, or as unit rows. units: whether vectors
    that are stored with their lengths (gradients) are brought to length 1.
    """

    kernel: str
    bandwidth: float
    lengths: bool
    units: bool
    ridge: float
    centres: Float[np.ndarray, "r e"]
    to_mean: Float[np.ndarray, "r m"]
    mean: Float[np.ndarray, " m"]
    to_spread: Float[np.ndarray, "r q"]

    @property
    def columns(self) -> int:
        """Scores of a row."""
        return self.to_mean.shape[1]

    @property
    def digest(self) -> str:
        """32 hex digits of everything in it."""
        return digest_of(*_parts(self))


def regression_predictor(model: LandmarkRegression, *, lengths: bool) -> Predictor:
    """Of a landmark regression; it states no variance."""
    none = np.empty((len(model.landmarks), 0))
    return Predictor(
        model.kernel,
        model.bandwidth,
        lengths,
        False,
        0.0,
        model.landmarks,
        model.alpha,
        model.mean,
        none,
    )


def posterior_predictor(posterior: Posterior, *, lengths: bool) -> Predictor:
    """Of a process: the mean phi'w, and the variance of a score not yet observed."""
    evidence, features = posterior.evidence, posterior.evidence.features
    return Predictor(
        features.kernel,
        features.bandwidth,
        lengths,
        False,
        evidence.ridge,
        features.inducing,
        features.whiten @ posterior.weights,
        evidence.mean,
        features.whiten @ posterior.shrink,
    )


def cosine_predictor(means: Float[np.ndarray, "m e"]) -> Predictor:
    """Cosine with each target's mean unit embedding (RDS+, arXiv 2503.01807)."""
    return linear_predictor(means, units=False)


def linear_predictor(vectors: Float[np.ndarray, "m e"], *, units: bool) -> Predictor:
    """Inner products with these vectors of rows as they are stored, or of their unit rows."""
    m = len(vectors)
    none = np.empty((m, 0))
    return Predictor("linear", 1.0, False, units, 0.0, vectors, np.eye(m), np.zeros(m), none)


class _Room(NamedTuple):
    """Memory of one block: rows (and what makes distances of them), kernel values, in float64."""

    wide: torch.Tensor
    cross: torch.Tensor
    exact: torch.Tensor


class Mapper:
    """A predictor on a device, ready to be applied to block after block.

    Kernel values and variances in float32: an error of 1e-6 is far below what a regression does not
    know. Scores are summed up in float64, so that a target's do not depend on the others.
    """

    def __init__(self, predictor: Predictor, device: str = "cpu") -> None:
        self._predictor, self._device = predictor, device
        # Distances do not change under a common shift, but their digits do: see kernels.py.
        shifted = predictor.kernel in ("rbf", "laplace")
        width = predictor.centres.shape[1]
        centre = predictor.centres.mean(axis=0) if shifted else np.zeros(width)
        self._centre = self._tensor(centre)
        centres = predictor.centres - centre
        if predictor.kernel == "cosine":
            centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-300)
        if shifted:
            # exp(-|x - z|) or exp(-|x - z|^2), the distances being stretched by this.
            stretch = (0.5 if predictor.kernel == "rbf" else 1.0) / predictor.bandwidth**2
            # Two columns more: |x|^2 - 2 x'z + |z|^2 is one product, without a pass for each term.
            squares = np.einsum("ij,ij->i", centres, centres)[:, None]
            centres = np.concatenate([-2.0 * centres, np.ones_like(squares), squares], axis=1)
            centres *= stretch
        self._centres = self._tensor(centres)
        self._to_mean = self._tensor(predictor.to_mean.T, torch.float64)
        self._to_spread = self._tensor(predictor.to_spread)

    def __call__(self, X: Float[np.ndarray, "b e"]) -> Predicted:
        """Scores of rows of embeddings (finite, of any float type)."""
        predictor = self._predictor
        width = predictor.centres.shape[1]
        if X.ndim != 2 or X.shape[1] != width:
            raise InputError(f"embeddings of shape {X.shape}: expected rows of {width} numbers")
        P = np.empty((len(X), predictor.columns))
        variance = np.zeros(len(X))
        step = max(_LEAST_ROWS, _BLOCK_ENTRIES // max(len(predictor.centres), width))
        step = max(1, min(len(X), step))
        room = self._room(step, width)
        for start in range(0, len(X), step):
            rows = slice(start, start + step)
            cross, diagonal = self._kernel(torch.from_numpy(X[rows]).to(self._device), room)
            exact = room.exact[: len(cross)].copy_(cross)
            P[rows] = (self._to_mean @ exact.T).T.cpu().numpy()
            if predictor.to_spread.shape[1]:
                explained = (cross @ self._to_spread).square_().sum(1)
                left = (diagonal - explained).clamp_min_(0.0)
                variance[rows] = left.double().cpu().numpy() + predictor.ridge
        P += predictor.mean
        return Predicted(P, variance)

    def _room(self, step: int, width: int) -> _Room:
        """Room for blocks of `step` rows: fresh memory costs as much as a pass over it."""
        r = len(self._predictor.centres)
        columns = self._centres.shape[1]
        empty = partial(torch.empty, device=self._device)
        room = _Room(empty(step, columns), empty(step, r), empty(step, r, dtype=torch.float64))
        room.wide[:, width:] = 1.0  # the last column stays, the one before is |x|^2
        return room

    def _kernel(
        self, given: Shaped[torch.Tensor, "b e"], room: _Room
    ) -> tuple[Float[torch.Tensor, "b r"], Float[torch.Tensor, " b"]]:
        """k(x, centres) and k(x, x), in float32; the first in the room's memory."""
        kernel, (count, width) = self._predictor.kernel, given.shape
        wide, cross = room.wide[:count], room.cross[:count]
        x = wide[:, :width].copy_(given)
        if kernel == "linear":
            return torch.matmul(x, self._centres.T, out=cross), x.square().sum(1)
        if kernel == "cosine":
            norm = x.norm(dim=1, keepdim=True)
            x /= torch.where(norm > 0, norm, 1.0)
            return torch.matmul(x, self._centres.T, out=cross), (norm[:, 0] > 0).to(x.dtype)
        x -= self._centre
        torch.linalg.vecdot(x, x, out=wide[:, width])
        distances = torch.matmul(wide, self._centres.T, out=cross).clamp_min_(0.0)
        if kernel == "laplace":
            distances.sqrt_()
        return distances.neg_().exp_(), torch.ones(count, device=given.device)

    def _tensor(self, values: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, dtype)


def write_predictor(url: str, predictor: Predictor) -> str:
    """Put it below a URL, named by its contents; returns its key."""
    return write_arrays(url, "regression", *_parts(predictor))


def read_predictor(url: str, key: str) -> Predictor:
    """Read what `write_predictor` left.

    Raises:
        InputError: the object is not the one that its name says.
    """
    scalars, arrays = read_arrays(url, key)
    values: dict[str, Any] = {**scalars, **arrays}
    return Predictor(**values)


def _parts(predictor: Predictor) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(plain values, arrays) of it."""
    values = {field.name: getattr(predictor, field.name) for field in fields(predictor)}
    arrays = {
        name: np.asarray(value, np.float64)
        for name, value in values.items()
        if isinstance(value, np.ndarray)
    }
    return {name: value for name, value in values.items() if name not in arrays}, arrays
