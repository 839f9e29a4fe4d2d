"""What a sketch does to scores and their predictions, told by its two independent halves."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from influence.intervals import Z95

CORRECTION_DRAWS = 50


def sketch_sd(halves: Float[np.ndarray, "2 l"]) -> float:
    """Standard deviation of the noise of the mean of two independent estimates.

    Var((a + b) / 2) = E (a - b)^2 / 4 for independent a and b with the same mean and variance.
    """
    return float(np.sqrt(np.mean((halves[0] - halves[1]) ** 2)) / 2.0)


def reliability_of(halves: Float[np.ndarray, "2 l"]) -> float | None:
    """Reliability of the mean of two halves: Spearman-Brown, 2r / (1 + r), r their Spearman.

    0 where r is not positive; None where a half is constant.
    """
    if is_constant(halves[0]) or is_constant(halves[1]):
        return None
    return spearman_brown(rank_correlation(halves[0], halves[1]))


def crossed_correlation(
    predicted: Float[np.ndarray, " l"],
    halves: Float[np.ndarray, "2 l"],
    loo_halves: Float[np.ndarray, "2 l"],
) -> float:
    """Correlation of predictions with noise-free scores, free of the sketch's noise.

    Halves a = y + e_a and b = y + e_b have independent noise, and the prediction is linear in the
    scores: p = (p_a + p_b) / 2 with p_a fitted to a alone. So cov(p_a, b) = cov(p_a, y), whatever
    p_a has learnt of e_a, cov(a, b) = var(y), and

        corr(p, y) = (cov(p_a, b) + cov(p_b, a)) / 2 / sqrt(var(p) cov(a, b)).

    Meaningful where cov(a, b) > 0 (0 is returned otherwise); not capped at 1.
    """
    agreement = float(np.cov(halves)[0, 1])
    spread = float(np.var(predicted, ddof=1))
    if agreement <= 0 or spread <= 0:
        return 0.0
    crossed = np.cov(loo_halves[0], halves[1])[0, 1] + np.cov(loo_halves[1], halves[0])[0, 1]
    return float(crossed / 2.0 / math.sqrt(spread * agreement))


def correction_halfwidth(
    y: Float[np.ndarray, " l"],
    predicted: Float[np.ndarray, " l"],
    halves: Float[np.ndarray, "2 l"],
    loo_halves: Float[np.ndarray, "2 l"],
) -> float:
    """Half of a 95 % interval of the crossed over the plain correlation.

    Two sources: the sample of landmarks (a bootstrap) and the one sketch that was drawn (how far
    the two crossings, each with the roles of the halves exchanged, are apart).
    """
    rng = np.random.Generator(np.random.PCG64(0))
    ratios = []
    for _ in range(CORRECTION_DRAWS):
        rows = rng.integers(0, len(y), len(y))
        plain = np.corrcoef(y[rows], predicted[rows])[0, 1]
        if np.isfinite(plain) and plain != 0:
            crossed = crossed_correlation(predicted[rows], halves[:, rows], loo_halves[:, rows])
            ratios.append(crossed / plain)
    one = np.cov(loo_halves[0], halves[1])[0, 1]
    other = np.cov(loo_halves[1], halves[0])[0, 1]
    apart = abs(one - other) / abs(one + other) if one + other else 1.0
    return math.hypot(Z95 * float(np.std(ratios)) if ratios else 1.0, apart)


def spearman_brown(r: float) -> float:
    return max(0.0, 2.0 * r / (1.0 + r)) if r > -1 else 0.0


def is_constant(values: np.ndarray) -> bool:
    # Predictions of a regression that found nothing differ by rounding only: no ranking.
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    # Here, and not above: every process of a run imports this module, and scipy.stats takes long.
    from scipy.stats import spearmanr

    return float(spearmanr(x, y)[0])  # type: ignore[arg-type]
