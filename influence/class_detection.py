"""Class detection: do the rows of a target's own class come first among the ranked candidates?

The benchmark of DataInf (Kwon et al., arXiv 2310.00902, section 4.3). A candidate that ranks high
for a target row is taken for one of its class; the true classes judge. Higher scores rank first,
and ties count as if they were broken at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class MeanError(NamedTuple):
    """A mean and its standard error, None where a single value says nothing of it."""

    mean: float
    error: float | None


def area_under_curve(scores: Float[np.ndarray, " n"], own: Bool[np.ndarray, " n"]) -> float:
    """How often a row of the class scores above one of the others, ties counted half.

    Raises:
        ValueError: no row of the class, or no other.
    """
    others = np.sort(scores[~own])
    if not own.any() or not len(others):
        raise ValueError("an AUC needs rows of the class and others")
    below = np.searchsorted(others, scores[own], side="left")
    upto = np.searchsorted(others, scores[own], side="right")
    return float((below + upto).mean() / (2 * len(others)))


def recall_of_class(scores: Float[np.ndarray, " n"], own: Bool[np.ndarray, " n"]) -> float:
    """Of the first ranks, as many as the class has rows, the share that is of the class.

    Rows that tie with the last of these ranks are in them with equal probability.

    Raises:
        ValueError: no row of the class.
    """
    size = int(own.sum())
    if not size:
        raise ValueError("a recall needs rows of the class")
    last = np.partition(scores, len(scores) - size)[len(scores) - size]
    above, tied = scores > last, scores == last
    left = size - above.sum()
    found = (above & own).sum() + left * (tied & own).sum() / tied.sum()
    return float(found / size)


def mean_error(values: Sequence[float] | Float[np.ndarray, " r"]) -> MeanError:
    """Mean over rows and its standard error."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return MeanError(float(array.mean()), error)
