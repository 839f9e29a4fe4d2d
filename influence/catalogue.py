"""The catalogue: one entry per row of the pool or of a target, from tokenising alone.

It says which rows can be scored, which are duplicates, and how long they are, before a model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from influence.candidates import SourceFile, short_names
from influence.errors import InputError
from influence.schemas import REASON_DUPLICATE

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
    ids: list[str]
    sources: list[str]
    groups: list[str | None]
    digests: list[bytes]
    n_tokens: Int[np.ndarray, "n"]
    n_response_tokens: Int[np.ndarray, "n"]
    truncated: Bool[np.ndarray, "n"]
    reason: list[str | None]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def eligible(self) -> Int[np.ndarray, "e"]:
        """Positions of the rows that can be scored and are no duplicates."""
        return np.flatnonzero([reason is None for reason in self.reason])

    def positions(self, file: SourceFile, rows: Sequence[int]) -> Int[np.ndarray, "r"]:
        """Positions of rows of a file (they are contiguous, from the file's first row)."""
        start = self._starts[file.url]
        return start + np.asarray(rows, dtype=np.int64)

    def tokens_of(self, file: SourceFile, rows: Iterable[int]) -> int:
        """Tokens of those rows of a file that a model would see, duplicates too."""
        start = self._starts[file.url]
        seen = (None, REASON_DUPLICATE)
        return sum(int(self.n_tokens[start + r]) for r in rows if self.reason[start + r] in seen)

    def by_file(self, positions: Iterable[int]) -> list[tuple[SourceFile, list[int]]]:
        """Group positions by file: (file, rows within it), in file order."""
        grouped: dict[int, list[int]] = {}
        for position in positions:
            grouped.setdefault(int(self.file[position]), []).append(int(self.row[position]))
        return [(self.files[index], grouped[index]) for index in sorted(grouped)]

    def reasons(self) -> dict[str, int]:
        """How many rows have no score, by reason, most frequent first."""
        return dict(Counter(reason for reason in self.reason if reason is not None).most_common())

    def exclude(self, positions: Sequence[int], reason: str) -> None:
        """Give rows a reason for having no score, where they have none yet."""
        for position in positions:
            if self.reason[position] is None:
                self.reason[position] = reason

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
    index = np.repeat(np.arange(len(files)), [file.rows for file in files])
    rows = whole.column("row").to_numpy()
    names = short_names([file.url for file in files])
    ids = [
        row_id(value, names[files[index[position]].url], rows[position])
        for position, value in enumerate(whole.column("id").to_pylist())
    ]
    reason = whole.column("reason").to_pylist()
    digests = whole.column("digest").to_pylist()
    if drop_duplicates:
        seen: set[bytes] = set()
        for position, digest in enumerate(digests):
            if reason[position] is None:
                if digest in seen:
                    reason[position] = REASON_DUPLICATE
                seen.add(digest)
    return Catalogue(
        files=list(files),
        file=index,
        row=rows,
        ids=ids,
        sources=[value or NO_SOURCE for value in whole.column("source").to_pylist()],
        groups=whole.column("group").to_pylist(),
        digests=digests,
        n_tokens=whole.column("n_tokens").to_numpy(),
        n_response_tokens=whole.column("n_response_tokens").to_numpy(),
        truncated=whole.column("truncated").to_numpy(),
        reason=reason,
    )
