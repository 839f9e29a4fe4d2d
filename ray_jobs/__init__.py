"""The steps of `influence` on a Ray cluster: a pool of replica actors, a reducer actor, jobs.

`run_select`, `run_evaluate` and `run_finetune` are the jobs, with the names and arguments that they
have in `influence`, where they run in this process. They join the cluster of RAY_ADDRESS or of an
earlier `ray.init`, or start Ray on this machine, as the commands do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_jobs.evaluate import run_evaluate
    from ray_jobs.finetune import run_finetune
    from ray_jobs.select import run_select

__all__ = ["run_evaluate", "run_finetune", "run_select"]


def __getattr__(name: str) -> Any:
    # Only when asked for: a module of a worker's imports neither the jobs nor what they bring.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.removeprefix('run_')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
