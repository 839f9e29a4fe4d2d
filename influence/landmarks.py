"""Landmarks: which rows get exact scores, and the kernel ridge regression from them to the rest.

Influence Distillation (arXiv 2505.19051, section 4): exact scores are computed for L landmarks and
carried to every other row through a kernel between cheap embeddings. The leave-one-out residuals
come from the same factorisation, so the quality of the approximation costs nothing to measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from influence.errors import InputError
from influence.kernels import KERNELS, bandwidth_of, diagonal

Chooser = Callable[[np.ndarray, Sequence[str], int], np.ndarray]

# Entries of one block of the kernel matrix in `predict`: 2^24 float64 are 128 MiB.
_BLOCK_ENTRIES = 1 << 24
# Landmarks per source from which on every source gets one.
_FLOOR_FROM = 4


@dataclass(frozen=True)
class LandmarkRegression:
    """A fitted regression: P_hat(x) = k(x, landmarks) alpha + mean.

    `ridge` is what stands on the kernel's diagonal: damping times the mean of that diagonal.
    The leave-one-out fields hold, for each landmark and target, the score minus the prediction of
    the regression that never saw this landmark, and that prediction. `calibration` marks the
    landmarks that were drawn uniformly: only their residuals speak for the rest of the pool.
    """

    landmarks: Float[np.ndarray, "l e"]
    alpha: Float[np.ndarray, "l m"]
    mean: Float[np.ndarray, " m"]
    kernel: str
    bandwidth: float
    damping: float
    ridge: float
    loo_residuals: Float[np.ndarray, "l m"]
    loo_predictions: Float[np.ndarray, "l m"]
    calibration: Bool[np.ndarray, " l"]


def row_keys(
    seed: int, digests: Sequence[bytes], *, purpose: bytes = b"landmark"
) -> UInt64[np.ndarray, " n"]:
    """One number per row, uniform on 64 bits, from the seed and the row's messages alone.

    Numbers for different purposes (16 bytes at most) are independent.

    A row keeps its key when rows are added or moved, so the rows with the smallest keys stay the
    same but for new ones that fall among them: their gradients are there already.
    """
    key = seed.to_bytes(8, "little")
    drawn = [
        hashlib.blake2b(digest, digest_size=8, key=key, person=purpose).digest()
        for digest in digests
    ]
    return np.frombuffer(b"".join(drawn), dtype="<u8").astype(np.uint64)


def choose_uniform(keys: UInt64[np.ndarray, " n"], count: int) -> Int[np.ndarray, " count"]:
    """The `count` rows with the smallest keys, sorted by row; all rows if count >= n.

    Uniform without replacement over seeds. A smaller count chooses a subset.
    """
    return np.sort(np.argsort(keys, kind="stable")[:count])


def choose_stratified(
    keys: UInt64[np.ndarray, " n"], sources: Sequence[str], count: int
) -> Int[np.ndarray, " count"]:
    """`count` of the rows, each source in proportion, its smallest keys first, sorted by row.

    Shares are rounded by largest remainder. With four landmarks per source or more, every source
    gets one row at least; with fewer that would take a good part of the landmarks away from where
    the pool's rows are, and the certificate weighs all landmarks alike. All rows if count >= n.
    """
    if count >= len(sources):
        return np.arange(len(sources))
    labels, codes = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    sizes = np.bincount(codes, minlength=len(labels))
    chosen = []
    for code, take in enumerate(_allocate(sizes, count)):
        members = np.flatnonzero(codes == code)
        chosen.append(members[choose_uniform(keys[members], int(take))])
    return np.sort(np.concatenate(chosen))


def _allocate(sizes: Int[np.ndarray, " s"], count: int) -> Int[np.ndarray, " s"]:
    """Whole rows per source that sum to `count` (< sizes.sum()), near their proportional shares."""
    shares = count * sizes / sizes.sum()
    floor = 1 if count >= _FLOOR_FROM * len(sizes) else 0
    taken = np.maximum(np.floor(shares).astype(np.int64), floor)
    while taken.sum() > count:  # the sources raised to one row are paid for by the others
        taken[np.argmax(np.where(taken > floor, taken - shares, -np.inf))] -= 1
    while taken.sum() < count:
        taken[np.argmax(np.where(taken < sizes, shares - taken, -np.inf))] += 1
    return taken


def _choose_uniform_of(
    keys: UInt64[np.ndarray, " n"], sources: Sequence[str], count: int
) -> Int[np.ndarray, " count"]:
    del sources
    return choose_uniform(keys, count)


# name -> function of (the key and the source of every eligible row, count)
CHOOSERS: dict[str, Chooser] = {
    "uniform": _choose_uniform_of,
    "certified": _choose_uniform_of,  # what the rounds begin with
    "stratified": choose_stratified,
}

# name -> how the certificate says it
CHOICES = {
    "uniform": "uniform: every row with the same probability",
    "stratified": "stratified: every source in proportion to its rows, uniform within it",
    "certified": "certified: uniform ones, then those that may be selected, then an audit",
}


def fit(
    X: Float[np.ndarray, "l e"],
    Y: Float[np.ndarray, "l m"],
    *,
    kernel: str = "rbf",
    damping: float = 0.01,
    calibration: Bool[np.ndarray, " l"] | None = None,
) -> LandmarkRegression:
    """Kernel ridge regression of the scores Y on the embeddings X, one factorisation for all m.

    `linear` means the embeddings as they are, with their lengths; `rbf` is meant for unit rows,
    as it takes one bandwidth for all, and `cosine` makes them itself.

        alpha = M (Y - mean(Y)),   M = (K + damping mean(diag K) I)^-1

    in float64 (Influence Distillation, arXiv 2505.19051, section 4). The bandwidth of `rbf` is the
    median distance between landmarks. With M at hand, the residual of landmark i under the
    regression without it, its mean refitted and bandwidth and ridge held, is

        (alpha_i + (y_i - mean(y)) / (L - 1) [M 1]_i) / M_ii

    because leaving i out moves the mean by (mean(y) - y_i) / (L - 1), and [M r]_i / M_ii is the
    leave-one-out residual for a fixed right-hand side r. Adding landmarks is fitting again on all
    of them; `calibration` (default: all) then says which ones were drawn uniformly.
    Raises InputError for fewer than three landmarks, non-finite values or a singular kernel.
    """
    X, Y = np.asarray(X, dtype=np.float64), np.asarray(Y, dtype=np.float64)
    _check(X, Y, kernel, damping)
    count = len(X)
    mask = np.ones(count, dtype=bool) if calibration is None else np.asarray(calibration, bool)
    if mask.shape != (count,):
        raise InputError(f"landmarks: a calibration mask of {mask.shape} for {count} landmarks")
    bandwidth = bandwidth_of(kernel, X)
    gram = KERNELS[kernel](X, X, bandwidth)
    # Not by the kernel: the distance of a row to itself has a rounding error, and laplace its root.
    np.fill_diagonal(gram, diagonal(kernel, X))
    scale = float(np.trace(gram)) / count
    # All embeddings zero: the kernel says nothing, and the answer is the mean whatever the ridge.
    ridge = damping * (scale if scale > 0 else 1.0)
    gram[np.diag_indices(count)] += ridge
    try:
        inverse = cho_solve(cho_factor(gram, lower=True), np.eye(count))
    except LinAlgError as error:
        raise InputError(
            f"landmarks.damping: {damping} leaves the kernel of {count} landmarks singular "
            "(equal or dependent embeddings); expected a larger value, such as 0.01"
        ) from error
    mean = Y.mean(axis=0)
    alpha = inverse @ (Y - mean)
    shift = (Y - mean) / (count - 1) * inverse.sum(axis=1)[:, None]
    residuals = (alpha + shift) / np.diag(inverse)[:, None]
    return LandmarkRegression(
        X, alpha, mean, kernel, bandwidth, damping, ridge, residuals, Y - residuals, mask
    )


def predict(model: LandmarkRegression, X: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n m"]:
    """P_hat = K(X, landmarks) alpha + mean, float64, in blocks of rows (X may be a memory map).

    Raises InputError for embeddings of another width or with non-finite values.
    """
    width = model.landmarks.shape[1]
    if X.ndim != 2 or X.shape[1] != width:
        raise InputError(f"embeddings of shape {X.shape}: expected rows of {width} numbers")
    kernel = KERNELS[model.kernel]
    predicted = np.empty((len(X), model.alpha.shape[1]))
    step = max(1, _BLOCK_ENTRIES // max(len(model.landmarks), width))
    for start in range(0, len(X), step):
        block = np.asarray(X[start : start + step], dtype=np.float64)
        _check_finite(block, "embedding", start)
        predicted[start : start + step] = (
            kernel(block, model.landmarks, model.bandwidth) @ model.alpha + model.mean
        )
    return predicted


def _check(X: np.ndarray, Y: np.ndarray, kernel: str, damping: float) -> None:
    if kernel not in KERNELS:
        raise InputError(f"landmarks.kernel: {kernel!r}; expected one of {', '.join(KERNELS)}")
    if not (np.isfinite(damping) and damping >= 0):
        raise InputError(f"landmarks.damping: {damping}; expected a number of 0 or more")
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
        raise InputError(f"landmarks: embeddings {X.shape} and scores {Y.shape} do not match")
    if len(X) < 3:
        raise InputError(
            f"landmarks.count: {len(X)} landmarks; expected 3 at least, and some hundreds "
            "for a useful regression: give more candidates or raise landmarks.count"
        )
    _check_finite(X, "embedding")
    _check_finite(Y, "score")


def _check_finite(values: np.ndarray, what: str, first: int = 0) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise InputError(
            f"the {what} of row {first + bad[0]} ({bad.size} such rows in this block) is not "
            "finite; expected finite numbers: give such a row a null score and leave it out"
        )
