"""An object in a store as a Python file, read through whatever interrupts a read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from influence.storage_errors import Location
from influence.stores import ask


@dataclass
class RemoteFile:
    """The part of Python's file protocol that pyarrow and gzip need, over an obstore reader."""

    location: Location
    url: str
    open: Callable[[], Any]
    closed: bool = False

    def __post_init__(self) -> None:
        self._reader: Any = self.open()
        self._size = self._reader.size

    def read(self, size: int | None = -1) -> bytes:
        wanted = None if size is None or size < 0 else size
        start = self.tell()

        def read(_store: Any) -> bytes:
            if self._reader is None:  # the last attempt failed in its middle
                self._reader = self.open()
                self._reader.seek(start)
            reader, self._reader = self._reader, None
            data = bytes(reader.read(wanted))
            self._reader = reader
            return data

        return ask(self.location, self.url, read)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._reader.seek(offset, whence)

    def tell(self) -> int:
        return self._reader.tell()

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        if not self.closed and self._reader is not None:
            self._reader.close()
        self.closed = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False
