"""Runs of method in2core: the reference's adapter, one shared cache, runs that are cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from tiny_run import Runner, Setup, save_adapter

from influence.cache import Cache
from influence.config import Config
from influence.gradient_rows import gradient_rows, layer_blocks
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


def gradients_of(cache: str, manifest: Any, content: str, *, unit: bool) -> dict[int, tuple]:
    """Row number -> (gradient, norms by layer) of a file, from the run's shards."""
    found = {}
    for key in manifest.stages["gradients"].planned:
        if content not in key:
            continue
        shard = Cache(cache).read(key)
        rows = gradient_rows(shard, unit=unit)
        if rows is not None:
            numbers = shard.table.column("row").to_numpy()[rows.usable].tolist()
            found |= dict(zip(numbers, zip(rows.vectors, rows.norms, strict=True), strict=True))
            found[-1] = (layer_blocks(shard.layout), None)
    return found


class Cut(Exception):
    """Ends a run in the middle."""


def cut_after(execute: Callable, after: int, stage: str) -> Callable:
    """The executor, which ends the run after so many units of a stage."""
    left = [after]

    def cut(bundles: Iterable[Any], on_result: Callable, on_failure: Callable) -> None:
        for bundle in bundles:
            if bundle.units[0].stage == stage:
                if not left[0]:
                    raise Cut
                left[0] -= 1
            execute([bundle], on_result, on_failure)

    return cut


def run_cut(config: Config, after: int, stage: str) -> None:
    """A run in this process that ends after so many units of a stage."""
    claim_run(config)
    job = prepare(config, Progress(quiet=True))
    execute = cut_after(local_execute(config, job.watch), after, stage)
    with pytest.raises(Cut):
        select(job, execute, Reducer(config))
