"""Choose which candidate samples to fine-tune a language model on, with what weight, and how sure.

What the commands do, for a notebook or a program of one's own, in this process:

    config = influence.load_config("job.yaml", selection__budget="10%")
    influence.run_select(config)
    influence.read_selection(config.run)

`docs/python.md` goes through all of it. The jobs on a Ray cluster have the same names and arguments
in `ray_jobs` (`ray_jobs.run_select(config)`): nothing in `influence` imports ray.

All of it is loaded when it is asked for: `import influence` alone brings no torch and no pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence.evaluation_tables import read_evaluation
    from influence.finetune_job import run_finetune
    from influence.interface import (
        list_cache,
        load_config,
        make_plan,
        prune_cache,
        read_fidelity,
        read_scores,
        read_selection,
        read_training,
    )
    from influence.numerics import compare_precisions
    from influence.one_process import run_evaluate, run_select
    from influence.report import build_report
    from influence.run_log import read_manifest
    from influence.status import read_status
    from influence.vector_export import export_vectors

__all__ = [
    "build_report",
    "compare_precisions",
    "export_vectors",
    "list_cache",
    "load_config",
    "make_plan",
    "prune_cache",
    "read_evaluation",
    "read_fidelity",
    "read_manifest",
    "read_scores",
    "read_selection",
    "read_status",
    "read_training",
    "run_evaluate",
    "run_finetune",
    "run_select",
]

# Names that are no module's: `influence.plan`, `report`, `status`, `evaluate` and `finetune` are
# modules, and become attributes of the package as soon as anything imports them.
_HOMES = {
    "build_report": "report",
    "compare_precisions": "numerics",
    "export_vectors": "vector_export",
    "read_evaluation": "evaluation_tables",
    "read_manifest": "run_log",
    "read_status": "status",
    "run_evaluate": "one_process",
    "run_finetune": "finetune_job",
    "run_select": "one_process",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'interface')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
