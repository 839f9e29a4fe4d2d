"""What identifies an input file: the hash of its bytes, taken while they are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from influence.errors import InputError

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file. `rows` are those that `limit` leaves, `total_rows` all it has.

    `content_hash` is the blake2b (32 hex digits) of the file's bytes as stored.
    """

    url: str
    content_hash: str
    rows: int
    total_rows: int


@dataclass
class Hashing:
    """A file object that hashes what is read from it."""

    raw: Any
    hasher: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    closed: bool = False

    def read(self, size: int = -1) -> bytes:
        data = bytes(self.raw.read(size))
        self.hasher.update(data)
        return data

    def finish(self) -> str:
        """Read to the end; the hash of the whole file."""
        while self.read(_CHUNK):
            pass
        return self.hasher.hexdigest()

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def changed(url: str) -> InputError:
    """The error for a file that is not the one that was scanned."""
    return InputError(f"{url}: the file changed since the job scanned it; start the job again")
