"""Seconds and memory of a run, on a CPU or a GPU; imports torch alone, as peers use it, too."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


class Clock:
    """Seconds of a run; what lies inside `paused` is not counted."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self._out = 0.0

    def start(self) -> None:
        """From zero, once the device is idle."""
        self.synchronize()
        self._out, self._begin = 0.0, time.perf_counter()

    def seconds(self) -> float:
        """Since `start`, once the device has finished, without the pauses."""
        self.synchronize()
        return time.perf_counter() - self._begin - self._out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        self.synchronize()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self._out += time.perf_counter() - begin


class Memory:
    """Present and peak memory in MB (1e6 bytes): of the process on a CPU, else of torch's pool.

    On a CPU it is the resident set. Where the kernel lets a process forget its peak (Linux:
    /proc/self/clear_refs), every run has its own; elsewhere the peak is that since the start.
    """

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self._cuda:
            torch.cuda.synchronize()

    def now_mb(self) -> float:
        """Memory in use, after what is free has been given back."""
        gc.collect()
        if self._cuda:
            return torch.cuda.memory_allocated() / 1e6
        _trim()
        return (_status_kb("VmRSS") or _max_rss_kb()) / 1e3 * 1.024

    def reset_peak(self) -> None:
        """Let the next peak start from the present use."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        _trim()
        with contextlib.suppress(OSError):  # no such file outside Linux; see the class
            Path("/proc/self/clear_refs").write_text("5")

    def peak_mb(self) -> float:
        """The highest use since `reset_peak`."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        return (_status_kb("VmHWM") or _max_rss_kb()) / 1e3 * 1.024


def _status_kb(key: str) -> float | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1])
    return None


def _max_rss_kb() -> float:
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / 1024 if sys.platform == "darwin" else found


def _trim() -> None:
    """Give memory that malloc holds in reserve back to the system (glibc)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)
