"""How many exact scores an embedding leaves to be looked at: what a choice between them goes by.

A cheap embedding that says little costs exact gradients later, a dear one is paid for on every
candidate. The leave-one-out beliefs of a few landmarks tell how many rows have to be looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from influence.errors import InputError
from influence.features import make_features
from influence.kernels import bandwidth_of
from influence.membership import exceeding
from influence.posterior import (
    Belief,
    Posterior,
    believe,
    calibrate,
    leave_one_out,
    no_evidence,
    observe,
    posterior_of,
)

#: Rows that span the features at most; see `influence.certified`.
MOST_INDUCING = 2048


class Looked(NamedTuple):
    """What a pilot says of one embedding.

    Attributes:
        share: of the rows without exact scores, the part to look at for the recall, in (0, 1].
        members: of those rows, the part that is expected among the best.
        loo: leave-one-out predictions of the landmarks.
    """

    share: float
    members: float
    loo: Float[np.ndarray, "l m"]


def head_thresholds(
    scores: Float[np.ndarray, "l c"], rows: int, *, shared: bool
) -> Float[np.ndarray, " c"]:
    """What a score has to exceed so that `rows` of the l rows do so in one of the columns.

    shared: one threshold for all columns (the rows with the largest of their scores), or else the
    same number of rows of each (round robin): the smallest for which they are `rows` rows together.
    Each lies halfway between the last row of the head and the next one. -inf if all rows are.

    Raises InputError for `rows` out of 1..l.
    """
    count, columns = scores.shape
    if not 1 <= rows <= count:
        raise InputError(f"embedding: a head of {rows} rows out of {count}")
    if shared:
        return np.full(columns, _below(np.sort(scores.max(axis=1))[::-1], rows))
    order = np.argsort(-scores, axis=0, kind="stable")
    depth = 1
    while len(np.unique(order[:depth])) < rows:
        depth += 1
    return np.array([_below(scores[order[:, c], c], depth) for c in range(columns)])


def _below(falling: Float[np.ndarray, " l"], rows: int) -> float:
    """Between the `rows`-th of falling numbers and the next one."""
    return -np.inf if rows == len(falling) else float(falling[rows - 1] + falling[rows]) / 2


def share_to_look_at(probability: Float[np.ndarray, " r"], recall: float) -> float:
    """The least part of the rows that holds `recall` of the expected members, likeliest first.

    The row that the recall is reached in counts in part, so that the share moves with every
    probability. 0 if no member is expected.
    """
    falling = np.sort(probability)[::-1]
    found = np.cumsum(falling)
    wanted = recall * found[-1]
    if wanted <= 0:
        return 0.0
    last = min(int(np.searchsorted(found, wanted)), len(falling) - 1)
    part = 1.0 - (found[last] - wanted) / falling[last]
    return float((last + part) / len(falling))


def look(
    X: Float[np.ndarray, "l e"],
    Y: Float[np.ndarray, "l m"],
    others: Float[np.ndarray, "r e"],
    decides: Float[np.ndarray, "m c"],
    *,
    share: float,
    recall: float,
    shared: bool,
    kernel: str,
    damping: float,
) -> Looked:
    """What l uniformly drawn landmarks and r other random rows say of an embedding.

    The process of a certified run's first round (`influence.posterior`) is fitted to the landmarks'
    scores; its scale is that of the leave-one-out residuals. A landmark's probability to be among
    the best `share` is that of its leave-one-out belief, another row's that of its prediction.

    Args:
        X, others: embeddings as the kernel takes them.
        decides: turns scores into those that decide (`influence.selection.Rule.decides`).
        shared: see `head_thresholds`.

    Raises InputError for fewer than 4 landmarks.
    """
    if len(X) < 4:
        raise InputError(f"embedding.kind: auto: {len(X)} landmarks; expected 4 at least")
    X, Y, others = (np.asarray(a, dtype=np.float64) for a in (X, Y, others))
    posterior = _process(X, Y, kernel, damping)
    left_out = leave_one_out(posterior, X, Y)
    calibration, loo = calibrate(left_out), Y - left_out.residuals
    rows = min(len(Y), max(1, round(share * len(Y))))
    tau = head_thresholds(Y @ decides, rows, shared=shared)
    beliefs = [Belief(loo, left_out.variance)]
    if len(others):
        beliefs.append(believe(posterior, others))
    probability = np.concatenate(
        [exceeding(mean, variance, calibration, decides, tau) for mean, variance in beliefs]
    )
    return Looked(share_to_look_at(probability, recall), float(probability.mean()), loo)


def _process(
    X: Float[np.ndarray, "l e"], Y: Float[np.ndarray, "l m"], kernel: str, damping: float
) -> Posterior:
    """After the landmarks; all of them are inducing, or a spread of MOST_INDUCING."""
    some = X[np.unique(np.linspace(0, len(X) - 1, min(len(X), MOST_INDUCING)).astype(int))]
    features = make_features(some, kernel=kernel, bandwidth=bandwidth_of(kernel, some))
    scale = float(features.diagonal(X).mean())
    ridge = damping * (scale if scale > 0 else 1.0)
    return posterior_of(observe(no_evidence(features, ridge=ridge, mean=Y.mean(axis=0)), X, Y))
