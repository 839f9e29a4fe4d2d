"""The catalogue: one entry per row of the pool or of a target, from tokenising alone.

It says which rows can be scored, which are duplicates, and how long they are, before a model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from influence.candidates import SourceFile, short_names
from influence.errors import InputError
from influence.schemas import REASON_DUPLICATE
from influence.text_columns import Digests, Labels, Texts

NO_SOURCE = "(none)"


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
    tables: Mapping[str, Sequence[pa.Table]],
    *,
    drop_duplicates: bool,
) -> Catalogue:
    """Put the catalogue shards of some files together; `tables` are per URL, in row order.

    With `drop_duplicates`, a row whose messages stood in an earlier row gets the reason
    "duplicate": it is scored through that earlier row and never selected a second time.

    Raises:
        InputError: not one row.
    """
    parts = [table for file in files for table in tables[file.url]]
    if not parts:
        raise InputError("the files hold no rows; expected at least one sample")
    whole = pa.concat_tables(parts)
    names = short_names([file.url for file in files])
    index = np.repeat(np.arange(len(files), dtype=np.int32), [file.rows for file in files])
    digests = Digests.of(whole.column("digest"))
    reason = Labels(whole.column("reason"))
    if drop_duplicates:
        scorable = np.flatnonzero(reason.missing)
        reason.put(scorable[digests.repeats(scorable)], REASON_DUPLICATE)
    return Catalogue(
        files=list(files),
        file=index,
        row=whole.column("row").to_numpy(),
        ids=_ids(whole, [names[file.url] for file in files], index),
        sources=_sources(whole.column("source")),
        groups=Labels(whole.column("group")),
        digests=digests,
        n_tokens=whole.column("n_tokens").to_numpy(),
        n_response_tokens=whole.column("n_response_tokens").to_numpy(),
        truncated=whole.column("truncated").to_numpy(),
        reason=reason,
    )


def _ids(whole: pa.Table, names: Sequence[str], index: Int[np.ndarray, "n"]) -> Texts:
    """The `id` column, and FILE:ROW where it is null."""
    given = whole.column("id")
    if not given.null_count:
        return Texts(given)
    files = pa.array(names).take(pa.array(index))
    rows = whole.column("row").cast(pa.string()).combine_chunks()
    places = pc.binary_join_element_wise(files, rows, ":")  # pyright: ignore
    return Texts(pc.coalesce(given.combine_chunks(), places))  # pyright: ignore


def _sources(given: pa.ChunkedArray) -> Labels:
    """The `source` column; NO_SOURCE where it is null or empty."""
    labels = Labels(given)
    labels.put(np.flatnonzero(labels.missing | labels.empty), NO_SOURCE)
    return labels
