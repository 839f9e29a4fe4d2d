"""How well a pool covers each target row: by influence, and by likeness of the texts.

By influence: the mass of the row's proponents (the sum of their scores), and their effective
number, the participation ratio (sum s)^2 / sum s^2, which is k for k equal proponents and 1 where
one of them holds everything. By likeness: the cosines of the nearest candidates' embeddings.

Both are sums or maxima over candidates, which come in any portions; memory for the target rows.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


class ProponentSums:
    """Sums over candidates of every column's scores above 0, and of those below."""

    def __init__(self, columns: int) -> None:
        self.proponents = np.zeros(columns, dtype=np.int64)
        self.opponents = np.zeros(columns, dtype=np.int64)
        self.mass = np.zeros(columns)
        self.harm = np.zeros(columns)
        self._squares = np.zeros(columns)

    def add(self, scores: Float[np.ndarray, "b m"]) -> None:
        """Further candidates; NaN is no score."""
        known = np.nan_to_num(scores)
        helpful = np.maximum(known, 0.0)
        self.proponents += (known > 0).sum(axis=0)
        self.opponents += (known < 0).sum(axis=0)
        self.mass += helpful.sum(axis=0)
        self.harm += np.maximum(-known, 0.0).sum(axis=0)
        self._squares += np.square(helpful).sum(axis=0)

    @property
    def effective(self) -> Float[np.ndarray, " m"]:
        """Proponents of equal score that would have the same spread; 0 without any."""
        squares = np.where(self._squares > 0, self._squares, 1.0)
        return np.where(self._squares > 0, self.mass**2 / squares, 0.0)


class Nearest:
    """The highest cosines of every target row with candidates, `count` of them at most."""

    def __init__(self, targets: Float[np.ndarray, "t d"], count: int) -> None:
        self._targets = _unit(targets)
        self._count = count
        self._best = np.empty((len(targets), 0))

    def add(self, embeddings: Float[np.ndarray, "b d"]) -> None:
        """Further candidates."""
        both = np.concatenate([self._best, self._targets @ _unit(embeddings).T], axis=1)
        keep = min(self._count, both.shape[1])
        self._best = -np.partition(-both, keep - 1, axis=1)[:, :keep] if keep else both

    @property
    def highest(self) -> Float[np.ndarray, " t"]:
        """The nearest candidate's cosine; NaN without candidates."""
        return self._best.max(axis=1) if self._best.shape[1] else np.full(len(self._best), np.nan)

    @property
    def mean(self) -> Float[np.ndarray, " t"]:
        """The mean of the nearest candidates' cosines; NaN without candidates."""
        return self._best.mean(axis=1) if self._best.shape[1] else np.full(len(self._best), np.nan)


def over_rows(
    values: Float[np.ndarray, " t"], groups: list[Int[np.ndarray, " r"]]
) -> Float[np.ndarray, " m"]:
    """The mean of rows' values for every column, which are means over rows of a target."""
    return np.array([values[rows].mean() for rows in groups])


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
