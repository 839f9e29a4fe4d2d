"""The certificate: how well predicted scores stand for exact ones, from leave-one-out residuals.

Landmarks drawn uniformly are a fair sample of the pool, and each has both its score and the
prediction of a regression that never saw it (`influence.landmarks`). That gives, per target
and at no further cost, R^2, Spearman, the recall of the top share, and an interval for every score.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtri

from influence.errors import InputError
from influence.intervals import (
    bootstrap_counts,
    jackknife_quantile,
    loo_spearman_interval,
    recall_of_top,
    spearman_interval,
    wilson_interval,
)
from influence.sketch_noise import (
    correction_halfwidth,
    crossed_correlation,
    is_constant,
    rank_correlation,
    reliability_of,
    sketch_sd,
    spearman_brown,
)

BOOTSTRAP_DRAWS = 2000
SCORE_LEVEL = 0.90


@dataclass(frozen=True)
class Spearman:
    """Rank correlation with its 95 % interval; None where scores or predictions are constant."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Recall:
    """Expected part of the true top share that is selected, with its 95 % interval."""

    expected: float | None
    low: float | None
    high: float | None


class TrueFidelity(NamedTuple):
    """Predictions against known scores: Spearman (None where a side is constant), top-k recall."""

    spearman: float | None
    recall: float


@dataclass(frozen=True)
class TargetFidelity:
    """One target's certificate. Scores and half widths are in the units of the scores.

    `r2` is 1 - PRESS / the squared error of the leave-one-out mean; sketch noise counts as error,
    so it is a lower bound for unprojected scores. `score_halfwidth` makes a 90 % interval around
    the prediction of a row that is no landmark, `landmark_halfwidth` one around the score of a
    landmark (0 if unprojected). `sketch_sd` is the standard deviation of a score's
    sketch noise and `reliability` the share of the scores' (rank) variance that is not noise;
    both None without halves. `spearman_corrected` says that attenuation was corrected.
    """

    r2: float | None
    spearman: Spearman
    spearman_corrected: bool
    recall: Recall
    score_halfwidth: float | None
    landmark_halfwidth: float
    sketch_sd: float | None
    reliability: float | None
    landmarks: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for JSON; what is undefined is None, never NaN."""
        return asdict(self)


def certify(
    Y: Float[np.ndarray, "l m"],
    loo_predictions: Float[np.ndarray, "l m"],
    *,
    n: int,
    share: float,
    halves: Float[np.ndarray, "2 l m"] | None = None,
    loo_halves: Float[np.ndarray, "2 l m"] | None = None,
    calibration: Bool[np.ndarray, " l"] | None = None,
    seed: int = 0,
) -> list[TargetFidelity]:
    """The certificate of every target from L landmarks of a pool of n rows.

    Y are the landmarks' scores and `loo_predictions` what the regression without each says.
    `halves`: two independent unbiased estimates of the scores whose mean is Y, from the two
    halves of a sketch; `loo_halves`: the leave-one-out predictions of regressions fitted to either
    half alone (both or neither). `share`: the budget over n, in (0, 1]. `calibration` marks the
    landmarks that were drawn uniformly; only they are used, and further exact rows (which can
    only raise the recall) are not counted, so the recall is a low estimate then.
    Raises InputError for fewer than four such landmarks, non-finite values, shapes or a share out
    of range.
    """
    Y, predicted = np.asarray(Y, np.float64), np.asarray(loo_predictions, np.float64)
    if (halves is None) != (loo_halves is None):
        raise InputError(
            "fidelity: halves and loo_halves belong together; expected both or neither"
        )
    both = None
    if halves is not None and loo_halves is not None:
        both = np.concatenate([np.asarray(halves, np.float64), np.asarray(loo_halves, np.float64)])
    if Y.ndim != 2 or predicted.shape != Y.shape:
        raise InputError(f"fidelity: scores {Y.shape} and predictions {predicted.shape} differ")
    if both is not None and both.shape != (4, *Y.shape):
        raise InputError(f"fidelity: halves and predictions {both.shape} for scores {Y.shape}")
    if not 0 < share <= 1:
        raise InputError(f"selection.budget: a share of {share} of the pool; expected (0, 1]")
    if calibration is not None:
        Y, predicted = Y[calibration], predicted[calibration]
        both = None if both is None else both[:, calibration]
    if not 4 <= len(Y) <= n:
        raise InputError(
            f"landmarks.count: {len(Y)} uniformly drawn landmarks of {n} rows; expected 4 at least"
        )
    for values in (Y, predicted) if both is None else (Y, predicted, both):
        if not np.isfinite(values).all():
            raise InputError("fidelity: a landmark's score or prediction is not finite")
    counts = bootstrap_counts(len(Y), BOOTSTRAP_DRAWS, seed)
    return [
        _certify_one(
            Y[:, t], predicted[:, t], None if both is None else both[:, :, t], n, share, counts
        )
        for t in range(Y.shape[1])
    ]


def _certify_one(
    y: Float[np.ndarray, " l"],
    predicted: Float[np.ndarray, " l"],
    both: Float[np.ndarray, "4 l"] | None,
    n: int,
    share: float,
    counts: Float[np.ndarray, "b l"],
) -> TargetFidelity:
    halves, loo_halves = (None, None) if both is None else (both[:2], both[2:])
    residuals = y - predicted
    sd = None if halves is None else sketch_sd(halves)
    reliability = None if halves is None else reliability_of(halves)
    constant = is_constant(y) or is_constant(predicted)
    spearman, corrected = Spearman(None, None, None), False
    recall = Recall(None, None, None)
    if not constant:
        spearman, corrected = spearman_of_rest(y, predicted, n, halves, loo_halves)
        recall = expected_recall(y, predicted, n, share, counts)
    return TargetFidelity(
        r2=loo_r2(y, predicted),
        spearman=spearman,
        spearman_corrected=corrected,
        recall=recall,
        score_halfwidth=jackknife_quantile(residuals, SCORE_LEVEL),
        landmark_halfwidth=float(ndtri(0.5 + SCORE_LEVEL / 2)) * (sd or 0.0),
        sketch_sd=sd,
        reliability=reliability,
        landmarks=len(y),
        share=share,
    )


def loo_r2(y: Float[np.ndarray, " l"], predicted: Float[np.ndarray, " l"]) -> float | None:
    """1 - sum (y - prediction)^2 / sum (y - mean of the others)^2; None for constant scores.

    Both predictions leave the row out: y_i minus the mean of the others is
    (y_i - mean(y)) L / (L - 1), so that predicting by the mean has an R^2 of 0.
    """
    if is_constant(y):
        return None
    baseline = (y - y.mean()) * len(y) / (len(y) - 1)
    return float(1.0 - np.sum((y - predicted) ** 2) / np.sum(baseline**2))


def spearman_of_rest(
    y: Float[np.ndarray, " l"],
    predicted: Float[np.ndarray, " l"],
    n: int,
    halves: Float[np.ndarray, "2 l"] | None = None,
    loo_halves: Float[np.ndarray, "2 l"] | None = None,
) -> tuple[Spearman, bool]:
    """Spearman of predictions with noise-free scores over the n - L rows that are no landmarks.

    The second value says whether the sketch's noise was corrected for. The noise acts in two ways:
    scores with noise correlate less with anything, and a regression fitted to them learns the part
    of the noise that similar rows share (a sketch is linear in the gradient), which makes its
    predictions look better against the same noisy scores than they are. `crossed_correlation` has
    neither effect; its ratio to the plain product-moment correlation is applied to the Spearman.
    Where the halves do not agree beyond chance, nothing is known of the noise: the uncorrected
    value and low limit stand, and the high limit is 1. Intervals: `influence.intervals` (Fisher's
    z, not a bootstrap: a bootstrap of the pairs cannot see that leave-one-out pairs depend on each
    other), widened by the reliability, and joined by the variance estimates recovery of Zou and
    Donner (Statistics in Medicine 27, 2008) with the uncertainty of the correction. Coverage is
    checked by simulation.
    """
    rho = rank_correlation(y, predicted)
    interval = loo_spearman_interval(rho, len(y), n - len(y))
    if halves is None or loo_halves is None:
        return Spearman(rho, *interval), False
    if np.array_equal(halves[0], halves[1]):
        return Spearman(rho, *interval), True
    if is_constant(halves[0]) or is_constant(halves[1]):
        return Spearman(rho, interval[0], 1.0), False
    agreement = rank_correlation(halves[0], halves[1])
    limits = spearman_interval(agreement, len(y))
    plain = float(np.corrcoef(y, predicted)[0, 1])
    if limits[0] <= 0 or plain == 0:
        return Spearman(rho, interval[0], 1.0), False
    value = rho * crossed_correlation(predicted, halves, loo_halves) / plain
    value = min(1.0, max(-1.0, value))
    low, high = loo_spearman_interval(value, len(y), n - len(y))
    extra = correction_halfwidth(y, predicted, halves, loo_halves) * abs(rho)
    reliability = spearman_brown(agreement)
    down, up = (
        abs(value) * 0.5 * abs(math.log(spearman_brown(limit) / reliability))
        for limit in reversed(limits)
    )
    low = value - math.hypot((value - low) / reliability, down, extra)
    high = value + math.hypot((high - value) / reliability, up, extra)
    return Spearman(value, max(-1.0, low), min(1.0, high)), True


def expected_recall(
    y: Float[np.ndarray, " l"],
    predicted: Float[np.ndarray, " l"],
    n: int,
    share: float,
    counts: Float[np.ndarray, "b l"],
) -> Recall:
    """Recall of the pool's true top share when landmarks rank by score, other rows by prediction.

    The L landmarks are a sample of the pool. Each stands for n / L rows: one of them (itself) is
    ranked by its score, the others like its leave-one-out prediction. So the pool's ranking is
    estimated by a mixture of the scores (mass L / n) and the predictions (1 - L / n), its top
    share is the selection, and the recall is the selected part of the mass whose score is in
    the top share by score. The predictions' pull towards the mean, which favours landmarks in the
    selection, is thus counted. The interval holds the 2.5 and 97.5 percentiles of the bootstrap
    over landmarks (`counts`, one resample a row) and the Wilson interval for share x L
    observations: with all or few of them found a bootstrap sees no variation.
    Both top shares are by the given scores: with sketch noise in them, the recall of the
    unprojected top share by the predictions is higher, by the landmarks themselves lower.
    """
    exact = len(y) / n
    ones = np.ones((1, len(y)))
    expected = min(1.0, float(recall_of_top(y, predicted, ones, share, exact)[0]))
    draws = recall_of_top(y, predicted, counts, share, exact)
    low, high = np.quantile(draws, [0.025, 0.975])
    wide = wilson_interval(expected, max(1.0, share * len(y)))
    if share == 1.0 or exact == 1.0:  # everything is selected, or everything is exact
        return Recall(expected, expected, expected)
    return Recall(expected, min(float(low), wide[0]), min(1.0, max(float(high), wide[1])))


def true_fidelity(
    predicted: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"], k: int
) -> TrueFidelity:
    """(spearman, recall of the top k) of predictions against known scores, for evaluations.

    Ties are broken by position. Raises InputError for shapes that differ, a k out of 1..n or
    values that are not finite.
    """
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if predicted.shape != truth.shape or not 1 <= k <= len(truth):
        raise InputError(f"fidelity: {predicted.shape} against {truth.shape} with a top {k}")
    if not (np.isfinite(predicted).all() and np.isfinite(truth).all()):
        raise InputError("fidelity: a score is not finite; leave out the rows without a score")
    wanted = np.argsort(-truth, kind="stable")[:k]
    found = np.argsort(-predicted, kind="stable")[:k]
    recall = len(np.intersect1d(wanted, found)) / k
    constant = is_constant(predicted) or is_constant(truth)
    return TrueFidelity(None if constant else rank_correlation(predicted, truth), recall)
