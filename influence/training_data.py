"""Rows to train on: tokens, masks and weights out of files; what is left out is counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from influence.candidates import SourceFile, read_column, read_rows
from influence.errors import InputError
from influence.finetune_steps import mean_one
from influence.tokenization import Encoded, Encoder

WEIGHT_COLUMN = "influence_weight"
NO_WEIGHT = "weight 0"
_CHUNK = 512


@dataclass(frozen=True)
class TrainingRows:
    """Rows that can be trained on, and their weights of mean 1.

    `left_out` counts the others by reason. `weighted` says whether the weights came with the rows.
    """

    encoded: list[Encoded]
    weights: Float[np.ndarray, " n"]
    left_out: dict[str, int] = field(default_factory=dict)
    weighted: bool = False

    @classmethod
    def of(
        cls, encoded: Sequence[Encoded], weights: Float[np.ndarray, " n"] | None = None
    ) -> TrainingRows:
        """Leave out what has no response tokens or a weight of 0, and scale the other weights.

        Raises:
            ValueError: a weight that is negative or no number.
        """
        raw = np.ones(len(encoded)) if weights is None else np.asarray(weights, dtype=np.float64)
        if len(raw) != len(encoded) or not np.isfinite(raw).all() or (raw < 0).any():
            raise ValueError("expected one finite weight of at least 0 for every row")
        reasons = [
            row.reason or (None if weight > 0 else NO_WEIGHT)
            for row, weight in zip(encoded, raw, strict=True)
        ]
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        return cls(
            [encoded[i] for i in kept],
            mean_one(raw[kept]),
            dict(Counter(reason for reason in reasons if reason is not None)),
            weights is not None,
        )

    @property
    def tokens(self) -> int:
        """Tokens of an epoch."""
        return sum(row.n_tokens for row in self.encoded)

    @property
    def digest(self) -> str:
        """32 hex digits that tell apart other tokens, masks, weights, and orders."""
        return digest_of(self.encoded, self.weights)


def digest_of(encoded: Sequence[Encoded], weights: Float[np.ndarray, " n"] | None = None) -> str:
    """32 hex digits of what a model sees of the rows, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in encoded:
        digest.update(len(row.input_ids).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(row.input_ids, "<i4").tobytes())
        digest.update(np.packbits(row.response_mask).tobytes())
    if weights is not None:
        digest.update(np.ascontiguousarray(weights, "<f8").tobytes())
    return digest.hexdigest()


def drawn_rows(count: int, fraction: float, seed: int) -> Int[np.ndarray, " r"]:
    """A random part of so many rows, one at least, in their order."""
    if fraction >= 1:
        return np.arange(count)
    generator = np.random.default_rng([seed, 0xF4AC])
    return np.sort(generator.permutation(count)[: max(1, round(fraction * count))])


def read_training_rows(
    files: Sequence[SourceFile],
    encode: Encoder,
    *,
    weighted: bool,
    fraction: float = 1.0,
    seed: int = 0,
) -> TrainingRows:
    """Read and tokenise the files' rows, with the column influence_weight if it is there.

    fraction: of all rows, drawn with `seed`; only those are tokenised.

    Raises:
        InputError: some files have weights and others do not, a weight is not a number of at least
            0, or no row can be trained on.
    """
    weights = _weights(files) if weighted else None
    chosen = drawn_rows(sum(file.rows for file in files), fraction, seed)
    encoded = [row for rows in encoded_chunks(files, encode, chosen) for row in rows]
    rows = TrainingRows.of(encoded, None if weights is None else weights[chosen])
    if not rows.encoded:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in rows.left_out.items())
        raise InputError(f"none of the {len(encoded)} rows can be trained on ({reasons})")
    return rows


def encoded_chunks(
    files: Sequence[SourceFile], encode: Encoder, chosen: Int[np.ndarray, " r"] | None = None
) -> Iterator[list[Encoded]]:
    """The rows of the files in order, some at a time; `chosen` are positions among all of them."""
    start = 0
    for file in files:
        rows = np.arange(file.rows)
        if chosen is not None:
            rows = chosen[(chosen >= start) & (chosen < start + file.rows)] - start
        for first in range(0, len(rows), _CHUNK):
            yield encode(read_rows(file, rows[first : first + _CHUNK].tolist()))
        start += file.rows


def _weights(files: Sequence[SourceFile]) -> Float[np.ndarray, " n"] | None:
    found: list[np.ndarray] = []
    without: list[str] = []
    for file in files:
        values = read_column(file, WEIGHT_COLUMN)
        if values is None:
            without.append(file.url)
        else:
            found.append(_checked(file, values))
    if found and without:
        raise InputError(
            f"{without[0]}: no column {WEIGHT_COLUMN}, which other files have; leave the weights "
            "out everywhere (finetune.weights: false), or train on one kind of file"
        )
    return np.concatenate(found) if found else None


def _checked(file: SourceFile, values: Sequence[object]) -> np.ndarray:
    for row, value in enumerate(values):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not np.isfinite(value) or value < 0:  # type: ignore[operator]
            raise InputError(
                f"{file.url} row {row}: {WEIGHT_COLUMN} is {value!r}; expected a number of at "
                "least 0 (or train without weights: finetune.weights: false)"
            )
    return np.array(values, dtype=np.float64)
