"""How sure the regression is of every score: a Gaussian process on the features of few rows.

The kernel ridge regression of `influence.landmarks` is the mean of a Gaussian process with noise of
variance ridge on its observations (Rasmussen and Williams, Gaussian Processes for Machine Learning,
2006, chapter 2). With features phi of r inducing rows it is Bayesian linear regression,

    y = mean + phi(x)'w + rest,   w ~ s^2 N(0, I),   rest ~ s^2 N(0, k(x, x) - |phi(x)|^2 + ridge)

(the FITC approximation of Snelson and Ghahramani, NIPS 2005), which is the process itself as long
as every observed row is inducing. One r x r factor serves all targets: their variances differ by
the scale s alone, which comes from the leave-one-out residuals of rows that were drawn uniformly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve, eigh

from influence.errors import InputError
from influence.features import Features

# Entries of one block of kernel values: 2^22 float64 are 32 MiB.
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Evidence:
    """What the observed rows say, summed: new rows are added, none is ever read again.

    precision: I + sum of phi phi' / noise. moment: sum of phi (y - mean)' / noise. rows: how many.
    """

    features: Features
    ridge: float
    mean: Float[np.ndarray, " m"]
    precision: Float[np.ndarray, "q q"]
    moment: Float[np.ndarray, "q m"]
    rows: int = 0


def no_evidence(features: Features, *, ridge: float, mean: Float[np.ndarray, " m"]) -> Evidence:
    """Before any observation. `ridge` is the variance of the noise, `mean` the prior mean.

    Raises InputError for a ridge that is not a positive number.
    """
    if not (np.isfinite(ridge) and ridge > 0):
        raise InputError(f"landmarks.damping: a ridge of {ridge}; expected a number above 0")
    size = features.size
    return Evidence(features, ridge, mean, np.eye(size), np.zeros((size, len(mean))))


def observe(
    evidence: Evidence, X: Float[np.ndarray, "l e"], Y: Float[np.ndarray, "l m"]
) -> Evidence:
    """The evidence with further rows: an update of rank l."""
    precision, moment = evidence.precision.copy(), evidence.moment.copy()
    for start, phi, noise in _blocks(evidence.features, evidence.ridge, X):
        weighted = phi / noise[:, None]
        precision += weighted.T @ phi
        moment += weighted.T @ (Y[start : start + len(phi)] - evidence.mean)
    return replace(evidence, precision=precision, moment=moment, rows=evidence.rows + len(X))


class LeaveOneOut(NamedTuple):
    """Observed rows, each under the process that never saw it.

    residuals: score minus prediction. variance: of the prediction of the noisy score, in units of
    the squared scale.
    """

    residuals: Float[np.ndarray, "l m"]
    variance: Float[np.ndarray, " l"]


class Belief(NamedTuple):
    """What is believed of rows without a score: mean, and variance of a score not yet observed.

    The variance, noise included, is in units of the squared scale.
    """

    mean: Float[np.ndarray, "n m"]
    variance: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Posterior:
    """The process after its observations. `weights` is E[w], `shrink` the root of I - Cov[w]."""

    evidence: Evidence
    weights: Float[np.ndarray, "q m"]
    covariance: Float[np.ndarray, "q q"]
    shrink: Float[np.ndarray, "q q"]


def posterior_of(evidence: Evidence) -> Posterior:
    """Solve for the weights: one factorisation for all targets."""
    factor = cho_factor(evidence.precision, lower=True)
    covariance = cho_solve(factor, np.eye(len(evidence.precision)))
    # The precision is I plus something positive, so every eigenvalue of I - Cov lies in [0, 1).
    values, vectors = eigh(np.eye(len(covariance)) - (covariance + covariance.T) / 2)
    shrink = vectors * np.sqrt(np.clip(values, 0.0, 1.0))
    return Posterior(evidence, cho_solve(factor, evidence.moment), covariance, shrink)


def believe(posterior: Posterior, X: Float[np.ndarray, "n e"]) -> Belief:
    """Mean phi'w and variance k - |phi|^2 + phi'Cov phi + ridge of rows of embeddings.

    One product with the kernel values for both: k - phi'(I - Cov)phi + ridge.
    """
    evidence, features = posterior.evidence, posterior.evidence.features
    to_mean, to_spread = features.whiten @ posterior.weights, features.whiten @ posterior.shrink
    mean = np.empty((len(X), to_mean.shape[1]))
    variance = np.empty(len(X))
    step = max(1, _BLOCK_ENTRIES // max(len(features.inducing), X.shape[1]))
    for start in range(0, len(X), step):
        rows = np.asarray(X[start : start + step], dtype=np.float64)
        cross = features.cross(rows)
        mean[start : start + step] = cross @ to_mean + evidence.mean
        explained = np.square(cross @ to_spread).sum(axis=1)
        left = np.maximum(features.diagonal(rows) - explained, 0.0)
        variance[start : start + step] = left + evidence.ridge
    return Belief(mean, variance)


def leave_one_out(
    posterior: Posterior, X: Float[np.ndarray, "l e"], Y: Float[np.ndarray, "l m"]
) -> LeaveOneOut:
    """Leave-one-out residuals and variances of rows that were observed with these scores.

    With h = phi'Cov phi / noise the leverage, the residual is (y - prediction) / (1 - h) and the
    variance noise / (1 - h) (Sherman and Morrison; features, mean and ridge held fixed).
    """
    evidence = posterior.evidence
    residuals, variance = np.empty(Y.shape), np.empty(len(Y))
    for start, phi, noise in _blocks(evidence.features, evidence.ridge, X):
        part = slice(start, start + len(phi))
        left = 1.0 - ((phi @ posterior.covariance) * phi).sum(axis=1) / noise
        residuals[part] = (Y[part] - evidence.mean - phi @ posterior.weights) / left[:, None]
        variance[part] = noise / left
    return LeaveOneOut(residuals, variance)


class Calibration(NamedTuple):
    """How far scores lie from what was believed: scale per target, correlation between targets.

    rows: number of residuals behind it.
    """

    scale: Float[np.ndarray, " m"]
    correlation: Float[np.ndarray, "m m"]
    rows: int


def calibrate(left_out: LeaveOneOut) -> Calibration:
    """Scale and correlation of the errors, from rows that were drawn uniformly.

    scale^2 is the mean of residual^2 / variance. The correlation is pulled towards independence by
    the part m / (m + l), so that it is positive definite for more targets than rows, too.
    """
    z = left_out.residuals / np.sqrt(left_out.variance)[:, None]
    scale = np.sqrt(np.mean(np.square(z), axis=0))
    # A constant target has no errors: its scale is 0, and it correlates with nothing.
    unit = z / np.where(scale > 0, scale, 1.0)
    rows, targets = unit.shape
    keep = rows / (rows + targets)
    correlation = keep * (unit.T @ unit) / rows + (1 - keep) * np.eye(targets)
    np.fill_diagonal(correlation, 1.0)
    return Calibration(scale, correlation, rows)


def _blocks(
    features: Features, ridge: float, X: Float[np.ndarray, "l e"]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, features, noise variances) in blocks of rows."""
    step = max(1, _BLOCK_ENTRIES // max(1, features.size))
    for start in range(0, len(X), step):
        rows = X[start : start + step]
        phi = features(rows)
        unexplained = features.diagonal(rows) - np.einsum("ij,ij->i", phi, phi)
        yield start, phi, ridge + np.maximum(unexplained, 0.0)
