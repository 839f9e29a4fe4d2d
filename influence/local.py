"""Execute units in this process, one after the other: the same worker, no cluster."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from influence.config import Config
from influence.errors import InputError, StorageError, UnitError
from influence.observer import Observer, Silent
from influence.pipeline import Execute
from influence.units import Bundle
from influence.worker import UnitResult, Worker

PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0


@dataclass
class _Attempt:
    bundle: Bundle
    failures: int = 0
    not_before: float = 0.0


def retry_pause(failures: int) -> float:
    """Seconds before a unit is tried again that the store has failed `failures` times: 2, 4, 8...

    A store that had answered before has been asked for a minute by then; see `influence.stores`.
    """
    return min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** (failures - 1))


def local_execute(config: Config, observer: Observer | None = None) -> Execute:
    """An executor for `influence.pipeline.select` that runs everything here.

    Bad input (`InputError`, a model that does not load among it) ends the job; a `UnitError` is a
    failed shard at once. Anything else is
    retried as often as the config says, after all that waits by then, and then recorded as a failed
    shard; a unit that the store failed waits `retry_pause` seconds at least.
    `observer` is told of time and retries; this process is the one replica.
    """
    worker = Worker(config)
    told: Observer = Silent() if observer is None else observer

    def execute(
        bundles: Sequence[Bundle],
        on_result: Callable[[Bundle, list[UnitResult]], None],
        on_failure: Callable[[Bundle, int, str], None],
    ) -> None:
        waiting = deque(_Attempt(bundle) for bundle in bundles)
        told.replicas(1, 0)
        since = time.monotonic()
        while waiting:
            attempt = _take(waiting)
            try:
                results = worker.run(attempt.bundle)
            except InputError:
                raise
            except UnitError as error:
                since = _account(told, attempt.bundle, since)
                on_failure(attempt.bundle, attempt.failures + 1, str(error))
            except Exception as error:
                since = _account(told, attempt.bundle, since)
                attempt.failures += 1
                if attempt.failures > config.replicas.retries:
                    text = f"{type(error).__name__}: {error}"
                    on_failure(attempt.bundle, attempt.failures, text)
                    continue
                if isinstance(error, StorageError):
                    attempt.not_before = time.monotonic() + retry_pause(attempt.failures)
                told.retried(attempt.bundle)
                waiting.append(attempt)
            else:
                since = _account(told, attempt.bundle, since)
                on_result(attempt.bundle, results)

    return execute


def _account(told: Observer, bundle: Bundle, since: float) -> float:
    now = time.monotonic()
    told.held(bundle, now - since)
    return now


def _take(waiting: deque[_Attempt]) -> _Attempt:
    """The first one whose pause is over; sleeps until there is one."""
    now = time.monotonic()
    attempt = next((each for each in waiting if each.not_before <= now), None)
    if attempt is None:
        attempt = min(waiting, key=lambda each: each.not_before)
        time.sleep(attempt.not_before - now)
    waiting.remove(attempt)
    return attempt
