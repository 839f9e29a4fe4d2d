"""Landmarks: which rows get exact scores, and the kernel ridge regression from them to the rest.

Influence Distillation (arXiv 2505.19051, section 4): exact scores are computed for L landmarks and
carried to every other row through a kernel between cheap embeddings. The leave-one-out residuals
come from the same factorisation, so the quality of the approximation costs nothing to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from influence.errors import InputError
from influence.kernels import KERNELS, median_distance

Chooser = Callable[[Sequence[str], int, int], np.ndarray]

# Entries of one block of the kernel matrix in `predict`: 2^24 float64 are 128 MiB.
_BLOCK_ENTRIES = 1 << 24


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


def choose_uniform(count: int, n: int, seed: int) -> Int[np.ndarray, " count"]:
    """`count` of the rows 0..n-1, uniformly without replacement, sorted; all if count >= n."""
    if count >= n:
        return np.arange(n)
    rng = np.random.Generator(np.random.PCG64(seed))
    return np.sort(rng.choice(n, size=count, replace=False))


def choose_stratified(sources: Sequence[str], count: int, seed: int) -> Int[np.ndarray, " count"]:
    """`count` of the rows, each source in proportion to its rows, uniform within it, sorted.

    Shares are rounded by largest remainder; every source gets one row at least as long as
    `count` is no smaller than the number of sources. All rows if count >= len(sources).
    """
    if count >= len(sources):
        return np.arange(len(sources))
    labels, codes = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    sizes = np.bincount(codes, minlength=len(labels))
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = [
        rng.choice(np.flatnonzero(codes == code), size=take, replace=False)
        for code, take in enumerate(_allocate(sizes, count))
    ]
    return np.sort(np.concatenate(chosen))


def _allocate(sizes: Int[np.ndarray, " s"], count: int) -> Int[np.ndarray, " s"]:
    """Whole rows per source that sum to `count` (< sizes.sum()), near their proportional shares."""
    shares = count * sizes / sizes.sum()
    floor = 1 if count >= len(sizes) else 0
    taken = np.maximum(np.floor(shares).astype(np.int64), floor)
    while taken.sum() > count:  # the sources raised to one row are paid for by the others
        taken[np.argmax(np.where(taken > floor, taken - shares, -np.inf))] -= 1
    while taken.sum() < count:
        taken[np.argmax(np.where(taken < sizes, shares - taken, -np.inf))] += 1
    return taken


def _choose_uniform_of(sources: Sequence[str], count: int, seed: int) -> Int[np.ndarray, " count"]:
    return choose_uniform(count, len(sources), seed)


# name -> function of (the source of every eligible row, count, seed)
CHOOSERS: dict[str, Chooser] = {"uniform": _choose_uniform_of, "stratified": choose_stratified}


def fit(
    X: Float[np.ndarray, "l e"],
    Y: Float[np.ndarray, "l m"],
    *,
    kernel: str = "rbf",
    damping: float = 0.01,
    calibration: Bool[np.ndarray, " l"] | None = None,
) -> LandmarkRegression:
    """Kernel ridge regression of the scores Y on the embeddings X, one factorisation for all m.

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
    bandwidth = median_distance(X) if kernel == "rbf" else 1.0
    gram = KERNELS[kernel](X, X, bandwidth)
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
