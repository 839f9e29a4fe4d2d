"""What identifies an input file: the hash of its bytes, taken while they are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from influence import storage
from influence.errors import InputError

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file. `rows` are those that `limit` leaves, `total_rows` all it has.

    `content_hash` is the blake2b (32 hex digits) of the file's bytes as stored. `stamp` is what the
    store said of it before they were hashed (`stamp_of`): no part of what the file is.
    """

    url: str
    content_hash: str
    rows: int
    total_rows: int
    stamp: str | None = field(default=None, compare=False)


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


def stamp_of(url: str) -> str | None:
    """Size and ETag (on a disk: inode and time of the last change); None for no such file."""
    info = storage.head(url)
    return None if info is None else f"{info.size} {info.etag}"


def check_unchanged(file: SourceFile) -> None:
    """See that a scanned file is still the one that was hashed.

    Equal stamps are enough. Other ones are not yet a change (the file may have been copied to this
    node, or put again): then its bytes are hashed once more.

    Raises:
        InputError: it holds other bytes, or is gone.
    """
    if file.stamp is None:
        return
    now = stamp_of(file.url)
    if now != file.stamp and (now is None or _hash_of(file.url, now) != file.content_hash):
        raise changed(file.url)


@lru_cache(maxsize=4096)
def _hash_of(url: str, stamp: str) -> str:
    source = Hashing(storage.open_input(url))
    try:
        return source.finish()
    finally:
        source.raw.close()


def changed(url: str) -> InputError:
    """The error for a file that is not the one that was scanned."""
    return InputError(f"{url}: the file changed since the job scanned it; start the job again")
