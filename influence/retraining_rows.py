"""Which rows a retraining is of: positions in the pool, as runs, told apart by their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from influence.array_files import read_arrays, write_arrays
from influence.candidates import SourceFile
from influence.catalogue import Catalogue
from influence.finetune_steps import mean_one

STAGE = "retraining"
FOLDER = "trainings"
"""Where, beside the scores of a run, the lists of rows lie that its replicas read."""


@dataclass(frozen=True, eq=False)
class Training:
    """One retraining.

    Attributes:
        rows: positions in the pool's catalogue, in order; none for the model as it is.
        weights: one for each row, of at least 0; None for equal ones.
        seed: of the fresh factors and of the order of the steps.
        label: what messages call it.
    """

    rows: Int[np.ndarray, " r"] | Sequence[int]
    weights: Float[np.ndarray, " r"] | None = None
    seed: int = 0
    label: str = ""


@dataclass(frozen=True)
class WrittenTraining:
    """A training as replicas find it.

    Attributes:
        key: of the object with its rows, below the URL that it was written to.
        digest: 32 hex digits of the rows' contents, order and weights; None without rows.
        tokens: of the rows, as the catalogue has them.
    """

    key: str
    digest: str | None
    tokens: int


@dataclass(frozen=True)
class ReadTraining:
    """What `write_trainings` wrote: rows by file and number, in the order of the training."""

    files: list[SourceFile]
    positions: Int[np.ndarray, " r"]
    weights: Float[np.ndarray, " r"] | None
    seed: int


def write_trainings(
    pool: Catalogue, trainings: Sequence[Training], url: str
) -> list[WrittenTraining]:
    """Put each training's rows below a URL, once, in a form that is short for most of a pool.

    A unit of work names such an object: it never carries the rows itself.

    Raises:
        ValueError: a position that the pool does not have, or weights that are none.
    """
    written = []
    for training in trainings:
        rows, weights = checked(training, len(pool))
        arrays = {"runs": runs_of(rows)}
        if weights is not None:
            arrays["weights"] = weights
        files = [asdict(file) for file in pool.files] if len(rows) else []
        key = write_arrays(url, FOLDER, {"files": files, "seed": training.seed}, arrays)
        digest = content_digest(pool.digests.at(rows), weights) if len(rows) else None
        tokens = int(pool.n_tokens[rows].sum(dtype=np.int64))
        written.append(WrittenTraining(key, digest, tokens))
    return written


def read_training(url: str, key: str) -> ReadTraining:
    """One of them.

    Raises:
        InputError: the object is not the one that its name says.
    """
    scalars, arrays = read_arrays(url, key)
    files = [SourceFile(**each) for each in scalars["files"]]
    return ReadTraining(files, rows_of(arrays["runs"]), arrays.get("weights"), scalars["seed"])


def checked(
    training: Training, pool_rows: int
) -> tuple[Int[np.ndarray, " r"], Float[np.ndarray, " r"] | None]:
    """Its rows and its weights of mean 1; None where all are equal.

    Raises:
        ValueError: a position that the pool does not have, or weights that are none.
    """
    rows = np.asarray(training.rows, dtype=np.int64)
    if len(rows) and not (rows.min() >= 0 and rows.max() < pool_rows):
        raise ValueError(f"expected positions below {pool_rows}, not {rows.min()} to {rows.max()}")
    if training.weights is None:
        return rows, None
    weights = np.asarray(training.weights, dtype=np.float64)
    if len(weights) != len(rows) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("expected one finite weight of at least 0 for every row")
    if not len(rows) or (weights == weights[0]).all():
        return rows, None
    return rows, mean_one(weights)


def content_digest(
    digests: UInt8[np.ndarray, "r 16"], weights: Float[np.ndarray, " r"] | None
) -> str:
    """32 hex digits that tell apart other messages, orders and weights, wherever the rows lie."""
    digest = hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=16)
    if weights is not None:
        digest.update(np.ascontiguousarray(weights, "<f8").tobytes())
    return digest.hexdigest()


def runs_of(rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, "2 k"]:
    """First positions and lengths of the runs of consecutive positions, in order.

    A pool without one row is two runs, and a random half takes no more room than its list.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if not len(rows):
        return np.zeros((2, 0), np.int64)
    begins = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    return np.stack([rows[begins], np.diff(begins, append=len(rows))])


def rows_of(runs: Int[np.ndarray, "2 k"]) -> Int[np.ndarray, " r"]:
    """The positions that `runs_of` was given."""
    parts = [np.arange(first, first + length) for first, length in runs.T.tolist()]
    return np.concatenate([np.empty(0, np.int64), *parts])


def places(
    files: Sequence[SourceFile], positions: Int[np.ndarray, " r"]
) -> list[tuple[SourceFile, Any, Any]]:
    """(file, rows within it, where in the list they stand), in file order."""
    ends = np.cumsum([file.rows for file in files])
    number = np.searchsorted(ends, positions, side="right")
    found = []
    for index in np.unique(number).tolist():
        where = np.flatnonzero(number == index)
        start = int(ends[index]) - files[index].rows
        found.append((files[index], positions[where] - start, where))
    return found
