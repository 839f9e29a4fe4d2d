"""JSONL files, plain, gzip or zstd: their lines, their count, and the objects in them."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from influence import storage
from influence.content import Hashing, changed
from influence.errors import InputError

_CHUNK = 1 << 20
_DAMAGED = (EOFError, OSError, zlib.error, pa.ArrowException)


def scan_lines(url: str) -> tuple[str, int]:
    """Content hash and number of lines that are not blank."""
    source = Hashing(storage.open_input(url))
    count = 0
    try:
        for line in _nonblank_lines(url, source):
            if not count and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                _refuse_array(url, line)
            count += 1
        return source.finish(), count
    finally:
        source.raw.close()


def _refuse_array(url: str, line: bytes) -> None:
    """A `.json` file that is one array would otherwise be a pool of unreadable rows."""
    name = url.lower().removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".json"):
        raise InputError(f"{url}: a JSON array; expected one JSON object per line (JSONL)")


def _nonblank_lines(url: str, source: Hashing) -> Iterator[bytes]:
    """The decompressed lines that are not blank, without their line ends."""
    rest = b""
    for chunk in _decompressed(url, source):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line for line in lines if line.strip())
    if rest.strip():
        yield rest


def _decompressed(url: str, source: Hashing) -> Iterator[bytes]:
    name = url.lower()
    try:
        stream: Any = source
        if name.endswith(".gz"):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=source, mode="rb"))  # type: ignore[arg-type]
        elif name.endswith(".zst"):
            stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
        while chunk := stream.read(_CHUNK):
            yield chunk
    except _DAMAGED as error:
        kind = "gzip" if name.endswith(".gz") else "zstd" if name.endswith(".zst") else "readable"
        raise InputError(f"{url}: not a whole {kind} file ({error}); write it again") from error


@lru_cache(maxsize=2)
def read_lines(url: str, content_hash: str) -> list[bytes]:
    """The lines of a JSONL file, kept for the next ranges; its bytes are checked on the way."""
    source = Hashing(storage.open_input(url))
    try:
        lines = list(_nonblank_lines(url, source))
        found = source.finish()
    finally:
        source.raw.close()
    if found != content_hash:
        raise changed(url)
    return lines


def parse_line(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or the reason why there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "malformed json"
    return value if isinstance(value, dict) else "malformed: not a json object"
