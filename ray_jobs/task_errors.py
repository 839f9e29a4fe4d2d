"""What a task of Ray raised, without what Ray puts around it."""

from __future__ import annotations

from ray.exceptions import RayTaskError

from influence.errors import InfluenceError


def cause_of(error: RayTaskError) -> BaseException:
    """The package's own error inside a task error, else the task error itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, InfluenceError) else error


def text_of(error: BaseException) -> str:
    """One line for a record: class and first line of what a task raised, or of the error."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
