"""The catalogue: one entry per row of the pool or of a target, from tokenising alone.

It says which rows can be scored, which are duplicates, and how long they are, before a model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from influence.candidates import SourceFile, short_names
from influence.errors import InputError
from influence.schemas import REASON_DUPLICATE
from influence.spool import Spool
from influence.text_columns import (
    DIGEST_BYTES,
    Digests,
    Labels,
    LabelSpool,
    Texts,
    TextSpool,
    digest_bytes,
)

NO_SOURCE = "(none)"
_NUMBERS = {
    "row": np.int64,
    "n_tokens": np.int32,
    "n_response_tokens": np.int32,
    "truncated": np.bool_,
}


@dataclass
class Catalogue:
    """Rows in file order; arrays are parallel, of length n.

    Attributes:
        files: the files, in order.
        file: index of each row's file.
        row: row within its file.
        ids: the `id` column's value, or FILE:ROW (FILE of `influence.candidates.short_names`).
        sources: the `source` column's value, or "(none)".
        groups: the `group_by` column's value of a target row, else None.
        n_tokens, n_response_tokens: after truncation.
        truncated: whether `max_length` cut the row.
        reason: why the row has no score, or None.
    """

    files: list[SourceFile]
    file: Int[np.ndarray, "n"]
    row: Int[np.ndarray, "n"]
    ids: Texts
    sources: Labels
    groups: Labels
    digests: Digests
    n_tokens: Int[np.ndarray, "n"]
    n_response_tokens: Int[np.ndarray, "n"]
    truncated: Bool[np.ndarray, "n"]
    reason: Labels

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def eligible(self) -> Int[np.ndarray, "e"]:
        """Positions of the rows that can be scored and are no duplicates."""
        return np.flatnonzero(self.scorable)

    @property
    def scorable(self) -> Bool[np.ndarray, "n"]:
        """Which rows can be scored and are no duplicates."""
        return self.reason.missing

    def positions(self, file: SourceFile, rows: Sequence[int]) -> Int[np.ndarray, "r"]:
        """Positions of rows of a file (they are contiguous, from the file's first row)."""
        start = self._starts[file.url]
        return start + np.asarray(rows, dtype=np.int64)

    def by_file(
        self, positions: Sequence[int] | Int[np.ndarray, "p"]
    ) -> list[tuple[SourceFile, list[int]]]:
        """Group positions by file: (file, rows within it), in file order."""
        wanted = np.asarray(positions, dtype=np.int64)
        files = self.file[wanted]
        return [
            (self.files[index], self.row[wanted[files == index]].tolist())
            for index in np.unique(files).tolist()
        ]

    def reasons(self) -> dict[str, int]:
        """How many rows have no score, by reason, most frequent first."""
        counts = {text: count for text, count in self.reason.counts().items() if text is not None}
        return dict(Counter(counts).most_common())

    def exclude(self, positions: Sequence[int] | Int[np.ndarray, "p"], reason: str) -> None:
        """Give rows a reason for having no score, where they have none yet."""
        rows = np.asarray(positions, dtype=np.int64)
        self.reason.put(rows[self.scorable[rows]], reason)

    @cached_property
    def _starts(self) -> dict[str, int]:
        starts, total = {}, 0
        for file in self.files:
            starts[file.url] = total
            total += file.rows
        return starts


def row_id(value: str | None, name: str, row: int) -> str:
    """A row's id in every result: the `id` column's value, or NAME:ROW with the file's name."""
    return value if value is not None else f"{name}:{row}"


def build_catalogue(
    files: Sequence[SourceFile],
    parts: Iterable[tuple[SourceFile, pa.Table]],
    *,
    drop_duplicates: bool,
) -> Catalogue:
    """Put the catalogue shards of some files together, in the order of files and rows.

    One part is held at a time: the columns lie in temporary files, some 70 bytes a row.
    With `drop_duplicates`, a row whose messages stood in an earlier row gets the reason
    "duplicate": it is scored through that earlier row and never selected a second time.

    Raises:
        InputError: not one row.
    """
    names = short_names([file.url for file in files])
    number = {file.url: index for index, file in enumerate(files)}
    numbers = {name: Spool(kind) for name, kind in _NUMBERS.items()}
    labels = {name: LabelSpool() for name in ("source", "group", "reason")}
    ids, digests, of_file = TextSpool(), Spool(np.uint8), Spool(np.int32)
    for file, table in parts:
        of_file.add(np.full(table.num_rows, number[file.url]))
        ids.add(_ids(table, names[file.url]))
        digests.add(digest_bytes(table.column("digest")))
        labels["source"].add(_sources(table.column("source")))
        for name in ("group", "reason"):
            labels[name].add(table.column(name))
        for name, spool in numbers.items():
            spool.add(table.column(name).to_numpy())
    made = Catalogue(
        files=list(files),
        file=of_file.array(),
        row=numbers["row"].array(),
        ids=ids.texts(),
        sources=labels["source"].labels(),
        groups=labels["group"].labels(),
        digests=Digests(digests.array().reshape(-1, DIGEST_BYTES)),
        n_tokens=numbers["n_tokens"].array(),
        n_response_tokens=numbers["n_response_tokens"].array(),
        truncated=numbers["truncated"].array(),
        reason=labels["reason"].labels(),
    )
    if not len(made):
        raise InputError("the files hold no rows; expected at least one sample")
    if drop_duplicates:
        scorable = np.flatnonzero(made.reason.missing)
        made.reason.put(scorable[made.digests.repeats(scorable)], REASON_DUPLICATE)
    return made


def _ids(table: pa.Table, name: str) -> pa.ChunkedArray:
    """The `id` column, and FILE:ROW where it is null."""
    given = table.column("id")
    if not given.null_count:
        return given
    places = [row_id(None, name, row) for row in table.column("row").to_pylist()]
    return pc.coalesce(given, pa.chunked_array([pa.array(places, pa.string())]))  # pyright: ignore


def _sources(given: pa.ChunkedArray) -> pa.ChunkedArray:
    """The `source` column; NO_SOURCE where it is null or empty."""
    named = pc.not_equal(pc.coalesce(given, ""), "")  # pyright: ignore
    return pc.if_else(named, given, NO_SOURCE)  # pyright: ignore
