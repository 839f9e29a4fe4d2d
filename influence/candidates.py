"""Candidate and target files: Parquet or JSONL, local or in object storage, as `Example` rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from influence import storage
from influence.content import SourceFile
from influence.errors import InputError
from influence.json_lines import parse_line, read_lines, scan_lines
from influence.parquet_rows import open_checked, read_rows, scan_parquet, take_rows
from influence.row_formats import COLUMNS, Message, parse_row

__all__ = [
    "Example",
    "Message",
    "SourceFile",
    "default_id",
    "read_examples",
    "read_table",
    "scan_files",
]

_KINDS = "`.parquet`, or `.jsonl`/`.json` with one object per line, plain or `.gz`/`.zst`"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file. `reason` says why it cannot be used, from a small fixed set, or None.

    `row` counts from 0 within the file; `group` is the `group_by` column's value (targets only).
    """

    id: str | None
    row: int
    messages: tuple[Message, ...]
    source: str | None
    group: str | None
    reason: str | None

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal exactly for rows with the same roles and texts in order."""
        turns = [[message.role, message.content] for message in self.messages]
        text = json.dumps(turns, ensure_ascii=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()


def scan_files(patterns: Sequence[str], limit: int | None = None) -> list[SourceFile]:
    """Find, hash and count the files of a pool: patterns in order, each one's matches sorted.

    A file matched twice counts once. With `limit`, the first rows in file order are kept and files
    behind them are not opened. Files without rows are left out as long as another has some.

    Raises:
        InputError: a pattern without a match, a file that is missing, of an unknown kind or
            damaged, or a pool without a single row.
    """
    if limit is not None and limit < 1:
        raise InputError(f"data.limit: expected a number of rows of at least 1, not {limit}")
    urls = {_identity(url): url for pattern in patterns for url in storage.expand(pattern)}
    files: list[SourceFile] = []
    left = limit
    for url in urls.values():
        if left == 0:
            break
        content_hash, total = scan_parquet(url) if _is_parquet(url) else scan_lines(url)
        kept = total if left is None else min(total, left)
        left = None if left is None else left - kept
        if kept:
            files.append(SourceFile(url, content_hash, kept, total))
    if not files:
        raise InputError(
            f"no rows in {', '.join(urls.values()) or 'an empty list of files'}: "
            f"expected at least one row in {_KINDS} files"
        )
    return files


def read_examples(
    file: SourceFile, first: int, last: int, group_by: str | None = None
) -> list[Example]:
    """Rows `first` to `last` (from 0, both included) of a file.

    Of a Parquet file only the row groups and columns that are needed are read. A row that cannot
    be used is there with its `reason`.

    Raises:
        IndexError: the range leaves the file.
        InputError: the file changed since it was scanned, or a row lacks the `group_by` column.
    """
    _check_rows(file, (first, last))
    if _is_parquet(file.url):
        wanted = (*COLUMNS, "id", "source", *([group_by] if group_by else []))
        with open_checked(file) as parquet:
            names = tuple(n for n in parquet.schema_arrow.names if n in wanted)
            if group_by is not None and group_by not in names:
                raise _no_group(file.url, first, group_by, parquet.schema_arrow.names)
            rows: list[Any] = read_rows(file, parquet, names, first, last)
    else:
        lines = read_lines(file.url, file.content_hash)[first : last + 1]
        rows = [parse_line(line) for line in lines]
    return [_example(file.url, first + i, row, group_by) for i, row in enumerate(rows)]


def read_table(file: SourceFile, rows: Sequence[int]) -> pa.Table:
    """The input columns of these rows (from 0), in the order given; a row may come twice.

    For JSONL the columns are the union over the rows; one whose values have no common Arrow type
    holds them JSON-encoded.

    Raises:
        IndexError: a row that the file does not have.
        InputError: the file changed since it was scanned, or a row is no JSON object.
    """
    _check_rows(file, rows)
    if _is_parquet(file.url):
        with open_checked(file) as parquet:
            return take_rows(file, parquet, rows)
    lines = read_lines(file.url, file.content_hash)
    parsed = []
    for row in rows:
        value = parse_line(lines[row])
        if isinstance(value, str):
            raise InputError(f"{file.url} row {row}: {value}; expected a JSON object")
        parsed.append(value)
    return _table_of(parsed)


def default_id(url: str, row: int) -> str:
    """The id of a row without an `id` column: file name and row. Not unique across folders."""
    return f"{url.rstrip('/').rsplit('/', 1)[-1]}:{row}"


def _identity(url: str) -> str:
    return url if "://" in url else os.path.realpath(url)


def _is_parquet(url: str) -> bool:
    """Tell Parquet from JSONL by the suffix; anything else is an error."""
    name = url.lower()
    if name.endswith(".parquet"):
        return True
    if name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")):
        return False
    raise InputError(f"{url}: unknown kind of file; expected {_KINDS}")


def _example(url: str, row: int, values: Mapping[str, Any] | str, group_by: str | None) -> Example:
    if isinstance(values, str):
        return Example(None, row, (), None, None, values)
    if group_by is not None and values.get(group_by) is None:
        raise _no_group(url, row, group_by, [k for k, v in values.items() if v is not None])
    messages, reason = parse_row(values)
    identifier, source = values.get("id"), values.get("source")
    return Example(
        id=None if identifier is None else str(identifier),
        row=row,
        messages=messages,
        source=None if source is None else str(source),
        group=None if group_by is None else str(values[group_by]),
        reason=reason,
    )


def _no_group(url: str, row: int, group_by: str, names: Sequence[str]) -> InputError:
    return InputError(
        f"{url} row {row}: no value in the group_by column {group_by!r}; "
        f"the row has {', '.join(names)}"
    )


def _check_rows(file: SourceFile, rows: Sequence[int]) -> None:
    outside = [row for row in rows if not 0 <= row < file.total_rows]
    if outside:
        raise IndexError(f"{file.url} has rows 0 to {file.total_rows - 1}, not {outside[0]}")


def _table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    try:
        column = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        column = None
    # Parquet has no struct without fields, which is what {} becomes.
    if column is None or "struct<>" in str(column.type):
        encoded = [None if value is None else json.dumps(value) for value in values]
        column = pa.array(encoded, pa.string())
    return column
