"""A real S3 store that answers 503, loses answers, is slow, hangs up, or goes away in mid-run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counted_driver import counted
from flaky_proxy import FlakyProxy, flaky_proxy
from s3 import S3Server
from storage_faults import computed_again, run_driver, write_outcome
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config, write_config

from influence import local, storage
from influence.config import Config
from influence.one_process import run_select
from influence.worker import Worker

pytestmark = pytest.mark.clusters

AWAY_SECONDS = 10.0


@pytest.fixture(scope="module")
def undisturbed(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run on a disk that every other one must equal."""
    config = tiny_config(setup, tmp_path_factory.mktemp("plain") / "run")
    run_select(config, quiet=True)
    return config.run


@pytest.fixture
def proxy(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FlakyProxy]:
    """Between this test and the store; it passes everything on until it is told otherwise."""
    with flaky_proxy(s3_server.endpoint) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        yield between


def remote_config(setup: Setup, url: str, **changes: Any) -> Config:
    """Run, cache, candidates and targets in the store."""
    for path in (setup.folder / "pool").iterdir():
        storage.put(f"{url}/pool/{path.name}", path.read_bytes())
    targets = {}
    for name, target in setup.targets.items():
        storage.put(f"{url}/targets/{name}.jsonl", Path(target["path"]).read_bytes())
        targets[name] = {**target, "path": f"{url}/targets/{name}.jsonl"}
    return tiny_config(
        setup,
        f"{url}/runs/tiny",
        cache=f"{url}/cache",
        data__candidates=[f"{url}/pool/*.parquet", f"{url}/pool/*.jsonl"],
        targets=targets,
        **changes,
    )


FAULTS = {
    "S3: 20 % of requests answered 503, half of them after they were done": {
        "refused": 0.1,
        "lost": 0.1,
    },
    "S3: 20 % of connections closed in mid-body or before the answer": {
        "cut": 0.15,
        "hung up": 0.05,
    },
}


def finish(
    fault: str, proxy: FlakyProxy, log: Path, undisturbed: str, run: str, began: float
) -> None:
    """The run equals the undisturbed one, and no shard was computed after its commit."""
    seconds = time.monotonic() - began
    met = sum(count for kind, count in proxy.counts.items() if kind != "passed")
    proxy.shares, proxy.delay = {}, 0.0  # what follows is not under test
    assert_same_results(undisturbed, run, f"{fault}: the store's faults changed the result")
    again = computed_again(log, proxy.created)
    write_outcome(fault, kills=met, recomputed=len(again), seconds=seconds)
    assert not again, f"computed once more after they were committed: {again}"
    for name, stage in manifest_of(run).stages.items():
        assert stage.computed + stage.reused == stage.shards, f"{name}: a shard is counted twice"
        assert not stage.failed
        assert not stage.damaged, f"{name}: a whole shard was taken for a damaged one"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_in_one_process_through(
    setup: Setup,
    tmp_path: Path,
    s3_url: str,
    proxy: FlakyProxy,
    undisturbed: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = remote_config(setup, s3_url)
    proxy.counts.clear()
    proxy.shares = FAULTS[fault]
    log, began = tmp_path / "log", time.monotonic()
    monkeypatch.setattr(local, "Worker", lambda config: counted(Worker(config), str(log)))
    run_select(config, quiet=True)
    assert sum(proxy.counts[kind] for kind in proxy.shares) > 20, "test too weak"
    finish(fault, proxy, log, undisturbed, config.run, began)


def test_a_run_on_ray_through_all_of_them(
    setup: Setup, tmp_path: Path, s3_url: str, proxy: FlakyProxy, undisturbed: str
) -> None:
    changes = {"replicas__min": 2, "replicas__max": 2}
    config = remote_config(setup, s3_url, **changes)
    path = write_config(tmp_path / "config.yaml", config)
    proxy.counts.clear()
    proxy.shares, proxy.delay = {"refused": 0.08, "lost": 0.06, "hung up": 0.02, "cut": 0.04}, 0.1
    log, began = tmp_path / "log", time.monotonic()
    done = run_driver(path, log)
    assert done.returncode == 0, done.stdout
    fault = "S3 on Ray, 2 replicas: 503s, lost answers, cut bodies and delays at once"
    finish(fault, proxy, log, undisturbed, config.run, began)


def test_a_store_that_goes_away_in_mid_run_on_ray(
    setup: Setup, tmp_path: Path, s3_url: str, proxy: FlakyProxy, undisturbed: str
) -> None:
    changes = {"replicas__min": 2, "replicas__max": 2}
    config = remote_config(setup, s3_url, **changes)
    path = write_config(tmp_path / "config.yaml", config)
    proxy.counts.clear()
    proxy.delay = 0.1
    proxy.go_away("/cache/gradients/", 2, AWAY_SECONDS)
    log, began = tmp_path / "log", time.monotonic()
    done = run_driver(path, log)
    assert done.returncode == 0, done.stdout
    assert proxy.counts["away"] == 1, "the run was over before the store went away: test too weak"
    fault = f"S3 on Ray, 2 replicas: slow (0.1 s), then no connection for {AWAY_SECONDS:.0f} s"
    finish(fault, proxy, log, undisturbed, config.run, began)
