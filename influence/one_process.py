"""The select and evaluate jobs in one process, without Ray: the same steps, the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from influence.config import Config
from influence.evaluate import evaluate
from influence.evaluations import Evaluation
from influence.hub import resolve_revision
from influence.job import Execute, Job, SelectRun
from influence.lease import driving
from influence.local import local_execute
from influence.methods import METHODS
from influence.own_training_run import make_training, train_here
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.reducer import Reducer
from influence.reference import with_reference
from influence.replica import choose_device
from influence.report import build_report
from influence.resume import claim_run
from influence.run_log import RunLog
from influence.transfer import compare_models


def run_select(
    config: Config,
    *,
    replace: bool = False,
    quiet: bool = False,
    after: Callable[[Job, Any], None] = lambda job, reduce: None,
) -> dict[str, Any]:
    """Select in this process and write the report; returns the reducer's summary.

    Args:
        replace: put the results over those of another config in the same run directory.
        quiet: show no progress.
        after: is called with the job and its reducer once the selection is written.

    Raises:
        InputError: among others, `replicas.num_gpus` above 0 and no CUDA device here.

    Example:
        >>> summary = influence.run_select(config, quiet=True)
        >>> summary["counts"]["scored"], summary["counts"]["selected"]
        (64, 8)
    """
    method = METHODS[config.method]
    if method.runs_model or method.stages:
        choose_device(config.model.device, config.replicas.num_gpus)
    if method.check_files is not None:
        method.check_files(config)
    given, nested = config, {"replace": True, "quiet": quiet}
    config = resolve_revision(with_reference(config))
    progress = Progress(quiet=quiet)
    with driving(config.run, progress.note) as lease:
        claim_run(config, replace=replace)
        log = RunLog(config.run, config.method, progress.note, lease)
        config, own = make_training(config, progress, log, train_here)
        job = prepare(config, progress, log, own)
        job.replicas = 1
        reduce = Reducer(config)
        summary = select(job, local_execute(config, job.watch), reduce)
        after(job, reduce)
        lease.check()
        compare_models(given, job.files, progress, partial(run_select, **nested), train_here)
        summary["report"] = build_report(config.run)
    return summary


def run_evaluate(config: Config, *, replace: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Evaluate in this process; returns the document of RUN/evaluation.json.

    What is measured is what the config's section `evaluation` names.

    Raises:
        InputError: among others, `replicas.num_gpus` above 0 and no CUDA device here.

    Example:
        >>> measured = influence.load_config(
        ...     "job.yaml", run=config.run, gradients={"parameters": "linear", "layer_dim": 16},
        ...     method="in2core", evaluation={"exact_inverse": {"rows": 16}})
        >>> found = influence.run_evaluate(measured, quiet=True)
        >>> sorted(found)
        ['exact_inverse']
    """
    choose_device(config.model.device, config.replicas.num_gpus)
    return evaluate(config, nullcontext, _workers, train_here, replace=replace, quiet=quiet)


@contextmanager
def _workers(job: Job, evaluation: Evaluation) -> Iterator[tuple[Execute, Any, SelectRun]]:
    select_run = partial(run_select, replace=True, quiet=True)
    yield local_execute(job.config, job.watch), evaluation.reducer(job.config), select_run
