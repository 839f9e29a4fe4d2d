"""Stop signals: SIGTERM and SIGINT end a job with exit code 130; what is committed stands."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from influence.errors import InterruptedRunError

#: Seconds after a stop signal in which further ones are ignored, so that the clean-up can end.
GRACE_SECONDS = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_INTERRUPTED = 130


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Leave the block with `InterruptedRunError` on SIGTERM or SIGINT.

    Inside the block a signal raises KeyboardInterrupt: no `except Exception` swallows it, and
    Ray's waits, which know no other exception of a handler, end at once.

    Yields a function that puts the handlers in place again, for after a call that has set its own.
    Handlers belong to the main thread: in any other one (a notebook's worker) nothing changes.

    Raises:
        InterruptedRunError: a signal arrived; the message names it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[tuple[int, float]] = []

    def stop(number: int, frame: object) -> None:
        now = time.monotonic()
        if received and now - received[-1][1] < GRACE_SECONDS:
            return
        received.append((number, now))
        raise KeyboardInterrupt

    def listen() -> None:
        for number in _SIGNALS:
            signal.signal(number, stop)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    listen()
    try:
        yield listen
    except (KeyboardInterrupt, SystemExit) as error:
        # The command line makes an exit of its own out of a KeyboardInterrupt.
        if not received or (isinstance(error, SystemExit) and error.code != _INTERRUPTED):
            raise
        raise InterruptedRunError(
            f"stopped by {signal.Signals(received[0][0]).name}: what is committed stands; "
            "the same command goes on from there"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
