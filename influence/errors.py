"""Errors that a user can act on, and the exit code each one ends the command with."""

from __future__ import annotations


class InfluenceError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class InputError(InfluenceError):
    """Bad config or data: names the key or the file and row, what was expected, what to do."""

    exit_code = 2


class TrainingError(InputError):
    """A training came to nothing for its own rows' or settings' sake: a loss that is no number."""


class RunBusyError(InputError):
    """Another driver is at work on the same directory; it can be waited for."""


class ModelLoadError(InputError):
    """The model, adapter or tokenizer could not be loaded; no other replica would fare better."""


class StorageError(InfluenceError):
    """The store failed (not reachable, timeouts, 5xx), or broke a promise the job rests on.

    A unit that meets one is tried again; elsewhere it ends the job.
    """

    exit_code = 2


class RunTakenError(InfluenceError):
    """Another driver has taken this run's directory over: this one writes nothing more into it."""

    exit_code = 2


class ShardsFailedError(InfluenceError):
    """Some shards failed for good; everything else is committed and the same command goes on."""

    exit_code = 3


class UnitError(InfluenceError):
    """A unit ends like this at every attempt, for reasons of its own: it is given up at once, and
    the others go on."""

    exit_code = 3


class ReducerLostError(InfluenceError):
    """The process that holds the run's arrays was lost (killed, out of memory, its node gone).

    Everything that was committed stands, and the same command goes on from there.
    """

    exit_code = 3


class WorkersLostError(InfluenceError):
    """The workers of a training failed more often than they are started again.

    Committed checkpoints stand, and the same command goes on from the newest one.
    """

    exit_code = 3


class InterruptedRunError(InfluenceError):
    """The job was told to stop (SIGINT, SIGTERM, `ray job stop`)."""

    exit_code = 130
