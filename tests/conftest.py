"""Fixtures that the whole session shares: a tiny model, a tiny pool, one Ray, one S3 store."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before any library that reads them is imported; worker processes inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's workers give way to everything else, which here is tests that wait for nothing: what starts
# a cluster would end last.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch
from cache_runs import copied, shared
from encoders import encoder
from gcs import gcs_endpoint, gs_url
from hub import data_hub
from in2core_runs import adapter, in2core
from markupsafe import Markup
from optimizer_training import lora
from s3 import s3_server, s3_url
from tiny_run import Runner, Setup, save_model, tiny_config, write_pool, write_targets

__all__ = [
    "adapter",
    "copied",
    "data_hub",
    "encoder",
    "gcs_endpoint",
    "gs_url",
    "in2core",
    "lora",
    "s3_server",
    "s3_url",
    "shared",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters come first: the last ones would run with idle cores beside them."""
    items.sort(key=lambda item: item.get_closest_marker("clusters") is None)


@pytest.fixture(scope="module", autouse=True)
def _undrawn_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """No figure is drawn but in files that look at them: it is half of what a tiny run takes."""
    from influence import plots

    def blank(figure: Any, alt: str) -> plots.Plot:
        return plots.Plot(Markup("<svg></svg>"), alt)

    with pytest.MonkeyPatch.context() as patched:
        if request.node.get_closest_marker("figures") is None:
            patched.setattr(plots, "_plot", blank)
        yield


_THREADS = torch.get_num_threads()


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A benchmark's command sets the threads of the whole process, and files of tests run beside
    each other: with more threads than free cores what comes after it takes ten times as long."""
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer Llama with random weights and a byte-level tokenizer, saved."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def setup(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """The model, a pool of two files and two targets."""
    folder = tmp_path_factory.mktemp("inputs")
    return Setup(tiny_model_folder, folder, write_pool(folder), write_targets(folder))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One embedded Ray for the session; `run_select` joins it."""
    import ray

    from ray_jobs.loopback import loopback_only

    with loopback_only():
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.WARNING,
            # A node that is killed is known to be after 5 s instead of 15.
            _system_config={"health_check_period_ms": 1000},
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def run(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """run(**changes) -> the run directory; each config runs once, all share one cache."""
    from influence.one_process import run_select

    folder = tmp_path_factory.mktemp("runs")
    made: dict[str, str] = {}

    def once(**changes: Any) -> str:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            config = tiny_config(
                setup, folder / f"run{len(made)}", cache=str(folder / "cache"), **changes
            )
            run_select(config, quiet=True)
            made[key] = config.run
        return made[key]

    return once
