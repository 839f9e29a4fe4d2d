"""How far one weighted step is expected to move the target loss, in first and second order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class PredictedChange:
    """Change of the mean target loss, in nats; negative is better.

    first: the gradient's part alone. second: with the curvature.
    """

    first: float
    second: float


def predicted_change(
    weights: Float[np.ndarray, " n"],
    p: Float[np.ndarray, " n"],
    *,
    eta: float,
    quadratic: float,
    drift: Float[np.ndarray, " n"] | None = None,
    offset_gradient: float = 0.0,
    offset_curvature: float = 0.0,
    total: int | None = None,
) -> PredictedChange:
    """Taylor expansion of the target loss along the step -eta (A'w / n + b).

    With p = A g_T, q = A H_T b (`drift`; None: 0), Q = (1/n) A H_T A' and `quadratic` = w'Qw:

        first:    -eta (p'w / n + g_T'b)
        second:   first + eta^2 (b'H_T b / 2 + q'w / n + w'Qw / (2n))

    (Influence Distillation, arXiv 2505.19051, section 3, with the constants that its objective
    leaves out.) `offset_gradient` is g_T'b, `offset_curvature` b'H_T b. n is `total`, by default
    the number of rows: where only the rows with weight are given it is that of the pool.
    """
    n = len(weights) if total is None else total
    w = np.asarray(weights, np.float64)
    first = -eta * (float(np.asarray(p, np.float64) @ w) / n + offset_gradient)
    cross = 0.0 if drift is None else float(np.asarray(drift, np.float64) @ w) / n
    curved = offset_curvature / 2 + cross + quadratic / (2 * n)
    return PredictedChange(first, first + eta**2 * curved)
