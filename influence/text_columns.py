"""Columns of texts for pools of millions of rows, with a few bytes a row beside the text itself.

Both are sequences of `str | None`. A list of Python strings takes a hundred bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, UInt8

from influence.spool import Spool

_AT_ONCE = 1 << 16
DIGEST_BYTES = 16


class Texts(Sequence):
    """Texts that may all be different, as one Arrow array."""

    def __init__(self, values: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> None:
        given: Any = values
        if not isinstance(values, pa.Array | pa.ChunkedArray):
            given = pa.array(values, pa.large_string())
        # Offsets of 64 bits: a chunk of string holds 2 GiB at most.
        chunks = given.cast(pa.large_string())
        self.arrow = chunks.combine_chunks() if isinstance(chunks, pa.ChunkedArray) else chunks

    def __len__(self) -> int:
        return len(self.arrow)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts | None:
        if isinstance(index, slice):
            return Texts(self.arrow[index])
        return self.arrow[int(index)].as_py()

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self.arrow.slice(start, _AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def ranks(self) -> Int[np.ndarray, " n"]:
        """The place of every row in the order of the texts, equal ones by position."""
        # Arrow sorts by bytes, which for UTF-8 is the order of code points, and stably.
        order = pc.sort_indices(self.arrow).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks


class TextSpool:
    """Texts without nulls, added chunk by chunk; they lie in a file."""

    def __init__(self) -> None:
        self._ends, self._bytes, self._total = Spool(np.int64), Spool(np.uint8), 0
        self._ends.add(np.zeros(1))

    def add(self, column: pa.Array | pa.ChunkedArray) -> None:
        """Append a column."""
        texts = Texts(column).arrow
        _, ends, data = texts.buffers()
        bounds = np.frombuffer(ends, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        if len(texts):
            self._bytes.add(np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]])
            self._ends.add(bounds[1:] - bounds[0] + self._total)
            self._total += int(bounds[-1] - bounds[0])

    def texts(self) -> Texts:
        """All of them; nothing can be added afterwards."""
        ends = self._ends.array()
        buffers = (pa.py_buffer(ends), pa.py_buffer(self._bytes.array()))
        return Texts(pa.LargeStringArray.from_buffers(len(ends) - 1, *buffers))


class Labels(Sequence):
    """Texts of which few are different: a code a row. `put` changes some rows."""

    def __init__(self, values: pa.Array | pa.ChunkedArray | Sequence[str | None]) -> None:
        given: Any = values
        if not isinstance(values, pa.Array | pa.ChunkedArray):
            given = pa.array(values, pa.string())
        if isinstance(given, pa.ChunkedArray):
            given = given.combine_chunks()
        coded = given.dictionary_encode(null_encoding="encode")
        self.values: list[str | None] = coded.dictionary.to_pylist()
        self.codes = np.array(coded.indices, dtype=np.int32)

    @classmethod
    def of(cls, codes: Int[np.ndarray, " n"], values: list[str | None]) -> Labels:
        """From the codes themselves."""
        made = cls([])
        made.codes, made.values = codes, values
        return made

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> Labels: ...
    def __getitem__(self, index: int | slice) -> str | Labels | None:
        if isinstance(index, slice):
            return Labels.of(self.codes[index].copy(), self.values)
        return self.values[self.codes[index]]

    def __iter__(self) -> Iterator[str | None]:
        values = self.values
        for start in range(0, len(self), _AT_ONCE):
            yield from (values[code] for code in self.codes[start : start + _AT_ONCE].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def arrow(self) -> pa.Array:
        """The texts as an Arrow array."""
        return pa.array(self.values, pa.string()).take(pa.array(self.codes))

    @property
    def missing(self) -> Bool[np.ndarray, " n"]:
        """Which rows have no text."""
        none = np.asarray([value is None for value in self.values], dtype=bool)
        return none[self.codes] if len(none) else np.zeros(len(self), dtype=bool)

    @property
    def empty(self) -> Bool[np.ndarray, " n"]:
        """Which rows have the empty text."""
        none = np.asarray([value == "" for value in self.values], dtype=bool)
        return none[self.codes] if len(none) else np.zeros(len(self), dtype=bool)

    def put(self, rows: Int[np.ndarray, " r"], value: str) -> None:
        """Give some rows another text."""
        if value not in self.values:
            self.values = [*self.values, value]
        self.codes[rows] = self.values.index(value)

    def counts(self, rows: Int[np.ndarray, " r"] | None = None) -> dict[str | None, int]:
        """How often each text occurs among some rows (default: all), by first occurrence."""
        codes = self.codes if rows is None else self.codes[rows]
        found, first, times = np.unique(codes, return_index=True, return_counts=True)
        order = np.argsort(first)
        return {self.values[found[i]]: int(times[i]) for i in order}


class LabelSpool:
    """Labels, added chunk by chunk; their codes lie in a file."""

    def __init__(self) -> None:
        self._codes, self._code_of = Spool(np.int32), dict[str | None, int]()

    def add(self, column: pa.Array | pa.ChunkedArray) -> None:
        """Append a column."""
        labels, known = Labels(column), self._code_of
        codes = [known.setdefault(value, len(known)) for value in labels.values]
        self._codes.add(np.asarray(codes, dtype=np.int32)[labels.codes])

    def labels(self) -> Labels:
        """All of them, by first occurrence; nothing can be added afterwards."""
        return Labels.of(self._codes.array(), list(self._code_of))


class Digests(Sequence):
    """Digests of 16 bytes, one a row."""

    def __init__(self, raw: UInt8[np.ndarray, "n 16"]) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Digests: ...
    def __getitem__(self, index: int | slice) -> bytes | Digests:
        if isinstance(index, slice):
            return Digests(self._raw[index])
        return self._raw[index].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (row.tobytes() for row in self._raw)

    def at(self, rows: Int[np.ndarray, " r"]) -> UInt8[np.ndarray, "r 16"]:
        """The digests of these rows, in the order given."""
        return self._raw[rows]

    def repeats(self, rows: Int[np.ndarray, " r"]) -> Bool[np.ndarray, " r"]:
        """Which of these rows (in increasing order) have the digest of an earlier one of them."""
        again = np.zeros(len(rows), dtype=bool)
        # Equal digests share their first byte: a sixteenth of the rows is sorted at a time.
        first = self._raw[:, 0][rows] >> 4
        for part in range(16):
            inside = np.flatnonzero(first == part)
            halves = np.ascontiguousarray(self._raw[rows[inside]]).view("<u8")
            order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal ones by position
            ordered = halves[order]
            again[inside[order[1:]]] = (ordered[1:] == ordered[:-1]).all(axis=1)
        return again


def digest_bytes(column: pa.ChunkedArray) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a column of digests, one after the other."""
    parts = [np.empty(0, np.uint8)]
    for chunk in column.chunks:
        data = np.frombuffer(chunk.buffers()[1] or b"", dtype=np.uint8)
        parts.append(data[chunk.offset * DIGEST_BYTES :][: len(chunk) * DIGEST_BYTES])
    return np.concatenate(parts)
