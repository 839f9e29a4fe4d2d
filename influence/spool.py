"""Growing arrays in temporary files: columns of a large pool that need not stay in memory.

The files have no name and are gone with the arrays. The system may drop their pages and read them
again, which it cannot do with a process's own memory.
"""

from __future__ import annotations

import tempfile

import numpy as np


class Spool:
    """Numbers of one type, added chunk by chunk, then seen as one array."""

    def __init__(self, dtype: np.typing.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="influence-")  # noqa: SIM115
        self._count = 0

    def add(self, values: np.ndarray) -> None:
        """Append to the file."""
        chunk = np.ascontiguousarray(values, dtype=self._dtype).reshape(-1)
        self._file.write(chunk.data.cast("B") if len(chunk) else b"")
        self._count += len(chunk)

    def array(self) -> np.ndarray:
        """All numbers, on the file's pages and writable; nothing can be added afterwards."""
        with self._file as file:
            if not self._count:
                return np.empty(0, self._dtype)
            file.flush()
            mapped = np.memmap(file, dtype=self._dtype, mode="r+", shape=(self._count,))
        # A plain array: slices of a memmap pass through Python code of its class.
        return np.asarray(mapped)
