"""Candidate and target files: Parquet or JSONL, local or in object storage, as `Example` rows."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from influence import storage
from influence.content import SourceFile, stamp_of
from influence.errors import InputError
from influence.json_lines import parse_line, read_lines, scan_lines
from influence.parquet_rows import open_checked, scan_parquet, take_rows, values_of_rows
from influence.row_formats import COLUMNS, EXPECTED, Message, parse_row

__all__ = [
    "Example",
    "Message",
    "SourceFile",
    "column_names",
    "read_column",
    "read_examples",
    "read_rows",
    "read_table",
    "scan_files",
    "short_names",
]

_COMMIT = re.compile(r"(?<=\w)@[0-9a-f]{40}(?=/)")
_KINDS = "`.parquet`, or `.jsonl`/`.json` with one object per line, plain or `.gz`/`.zst`"


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file. `reason` says why it cannot be used, from a small fixed set, or None.

    `row` counts from 0 within the file; `group` is the `group_by` column's value (targets only).
    `url` is the file's, for messages to the user; rows of another place may be equal.
    """

    id: str | None
    row: int
    messages: tuple[Message, ...]
    source: str | None
    group: str | None
    reason: str | None
    url: str = field(default="", compare=False)

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
        # Taken first: a change while the file is hashed then shows.
        stamp = stamp_of(url)
        content_hash, total = scan_parquet(url) if _is_parquet(url) else scan_lines(url)
        kept = total if left is None else min(total, left)
        left = None if left is None else left - kept
        if kept:
            files.append(SourceFile(url, content_hash, kept, total, stamp))
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
    return read_rows(file, range(first, last + 1), group_by) if first <= last else []


def read_rows(file: SourceFile, rows: Sequence[int], group_by: str | None = None) -> list[Example]:
    """These rows of a file (from 0), in the order given; a row may come twice.

    Of a Parquet file only the row groups that hold them are read, one at a time; of JSONL only
    their lines are parsed. A row that cannot be used is there with its `reason`.

    Raises:
        IndexError: a row that the file does not have.
        InputError: the file changed since it was scanned, or a row lacks the `group_by` column.
    """
    _check_rows(file, rows)
    if not len(rows):
        return []
    if _is_parquet(file.url):
        wanted = (*COLUMNS, "id", "source", *([group_by] if group_by else []))
        with open_checked(file) as parquet:
            names = tuple(n for n in parquet.schema_arrow.names if n in wanted)
            if group_by is not None and group_by not in names:
                raise _no_group(file.url, rows[0], group_by, parquet.schema_arrow.names)
            values: list[Any] = values_of_rows(file, parquet, names, rows)
    else:
        lines = read_lines(file.url, file.content_hash)
        values = [parse_line(lines[row]) for row in rows]
    return [
        _example(file.url, int(row), value, group_by)
        for row, value in zip(rows, values, strict=True)
    ]


def read_column(file: SourceFile, name: str) -> list[Any] | None:
    """One column of the file's rows (`file.rows` of them); None if no row has it.

    A JSONL row without it, or that is no JSON object, has None.

    Raises:
        InputError: the file changed since it was scanned.
    """
    if _is_parquet(file.url):
        with open_checked(file) as parquet:
            if name not in parquet.schema_arrow.names:
                return None
            rows = values_of_rows(file, parquet, (name,), range(file.rows))
        return [row[name] for row in rows]
    parsed = [parse_line(line) for line in read_lines(file.url, file.content_hash)[: file.rows]]
    if not any(isinstance(row, dict) and name in row for row in parsed):
        return None
    return [row.get(name) if isinstance(row, dict) else None for row in parsed]


def column_names(file: SourceFile) -> list[str]:
    """The names of a file's columns; of JSONL those of all rows, in order of appearance.

    Raises:
        InputError: the file changed since it was scanned.
    """
    if _is_parquet(file.url):
        with open_checked(file) as parquet:
            return list(parquet.schema_arrow.names)
    parsed = map(parse_line, read_lines(file.url, file.content_hash)[: file.rows])
    return list(dict.fromkeys(name for row in parsed if isinstance(row, dict) for name in row))


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


def short_names(urls: Sequence[str]) -> dict[str, str]:
    """A short name for each file, all different: its base name where no other file has it.

    Else as many trailing parts of the path as no other file ends with, at least; the whole URL if
    need be. Depends on the set of URLs alone, and not on the commit of a dataset on the hub. Rows
    without an `id` are called NAME:ROW.
    """
    plain = {url: _COMMIT.sub("", url) for url in urls}
    if len(set(plain.values())) < len(plain):  # one dataset of the hub at two commits
        plain = {url: url for url in urls}
    parts = {url: name.rstrip("/").split("/") for url, name in plain.items()}
    names: dict[str, str] = {}
    left, depth = list(parts), 0
    while left:
        depth += 1
        count = Counter(tuple(each[-depth:]) for each in parts.values())
        for url in left:
            if count[tuple(parts[url][-depth:])] == 1 or depth >= len(parts[url]):
                names[url] = "/".join(parts[url][-depth:])
        left = [url for url in left if url not in names]
    return names


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
        return Example(None, row, (), None, None, values, url)
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
        url=url,
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


def none_usable(key: str, files: Sequence[SourceFile], reasons: Mapping[str, int]) -> InputError:
    """The error for files without a usable row; `reasons`: how many rows have which.

    key: the config's, that names the files.
    """
    rows = sum(file.rows for file in files)
    where = ", ".join(file.url for file in files[:3]) + (", ..." if len(files) > 3 else "")
    counted = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
    return InputError(
        f"{key}: none of the {rows:,} rows of {where} can be used ({counted}); expected {EXPECTED}"
    )
