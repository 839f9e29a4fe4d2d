"""Stop signals: SIGTERM and SIGINT end a job with exit code 130; what is committed stands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from influence.errors import InterruptedRunError


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `InterruptedRunError` inside the block.

    Handlers belong to the main thread: in any other one (a notebook's worker) nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise InterruptedRunError(
            f"stopped by {signal.Signals(number).name}: what is committed stands; "
            "the same command goes on from there"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
