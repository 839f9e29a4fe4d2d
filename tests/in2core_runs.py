"""Runs of method in2core: the reference's adapter, one shared cache, runs that are cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tiny_run import Runner, Setup, save_adapter

from influence.config import Config
from influence.local import local_execute
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.reducer import Reducer
from influence.resume import claim_run


@pytest.fixture(scope="module")
def adapter(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), setup.model)


@pytest.fixture(scope="module")
def in2core(run: Runner, adapter: str) -> Runner:
    """As the fixture `run`, with the method and its reference."""
    return lambda **changes: run(method="in2core", reference__adapter=adapter, **changes)


class Cut(Exception):
    """Ends a run in the middle."""


def run_cut(config: Config, after: int, stage: str) -> None:
    """A run in this process that ends after so many units of a stage."""
    claim_run(config)
    job = prepare(config, Progress(quiet=True))
    plain = local_execute(config, job.watch)
    left = [after]

    def execute(bundles: Iterable[Any], on_result: Callable, on_failure: Callable) -> None:
        for bundle in bundles:
            if bundle.units[0].stage == stage:
                if not left[0]:
                    raise Cut
                left[0] -= 1
            plain([bundle], on_result, on_failure)

    with pytest.raises(Cut):
        select(job, execute, Reducer(config))
