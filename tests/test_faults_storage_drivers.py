"""Two drivers on one run directory: one of them writes it, and nothing is ever mixed."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from storage_faults import computations, start_driver, wait_until, write_outcome
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    results_of,
    tiny_config,
    write_config,
)

from influence import lease, storage
from influence.errors import RunTakenError
from influence.one_process import run_select
from influence.reducer import Reducer

pytestmark = pytest.mark.clusters

SECONDS = 120.0
CHANGES: dict[str, Any] = {"method": "exact", "replicas__gradient_rows_per_shard": 1}


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen]]:
    """Drivers that a test starts; ended by pid when it is over."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=SECONDS)


def test_of_two_drivers_at_once_one_is_refused(
    setup: Setup, tmp_path: Path, s3_url: str, drivers: list[subprocess.Popen]
) -> None:
    plain = tiny_config(setup, tmp_path / "plain", **CHANGES)
    run_select(plain, quiet=True)
    config = tiny_config(setup, f"{s3_url}/run", **CHANGES)
    path, log = write_config(tmp_path / "config.yaml", config), tmp_path / "log"
    began = time.monotonic()
    drivers += [start_driver(path, log, "--in-process") for _ in range(2)]
    texts = [driver.communicate(timeout=SECONDS)[0] for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    assert sorted(codes) == [0, 2], f"not one done and one refused: {codes}\n{texts}"
    refused = texts[codes.index(2)]
    winner = drivers[codes.index(0)].pid
    assert "is being written by another driver" in refused
    assert f"process {winner} on" in refused, "the one that has it is not named"
    assert "Traceback" not in refused
    assert_same_results(plain.run, config.run, "two drivers at once gave another result")
    keys = [key for key, _ in computations(log)]
    assert len(keys) == len(set(keys)), "a shard was computed by both"
    stages = manifest_of(config.run).stages.values()
    assert sum(stage.computed for stage in stages) == len(keys)
    write_outcome(
        "two drivers started at once on one run directory in S3",
        kills=1,
        recomputed=0,
        outcome="one done, bit for bit; the other refused (exit 2), naming the first",
        seconds=time.monotonic() - began,
    )


def test_a_driver_that_was_paused_leaves_the_run_to_its_successor(
    setup: Setup,
    tmp_path: Path,
    drivers: list[subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(setup, tmp_path / "run", cache=str(tmp_path / "cache"), **CHANGES)
    path, log = write_config(tmp_path / "config.yaml", config), tmp_path / "log"
    began = time.monotonic()
    # It does not wait with its look at the lease until the pause is a long one.
    first = start_driver(path, log, "--in-process", environment={"LEASE_TRUST_SECONDS": "0"})
    drivers.append(first)
    gradients = tmp_path / "cache" / "gradients"
    wait_until(lambda: len(list(gradients.glob("*/*.parquet"))) > 5)
    first.send_signal(signal.SIGSTOP)
    # Another config over the same cache, put in the place of the first one's results.
    other = config.model_copy(update={"seed": 7})
    plain = other.model_copy(update={"run": str(tmp_path / "plain"), "cache": None})
    run_select(plain, quiet=True)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    run_select(other, replace=True, quiet=True)
    manifest, results = manifest_of(other.run), results_of(other.run)
    first.send_signal(signal.SIGCONT)
    text, _ = first.communicate(timeout=SECONDS)
    assert first.returncode == 2, text
    assert "was taken over by another driver" in text, "the first one is not told why it stopped"
    assert "Traceback" not in text
    assert results_of(other.run) == results, "the first driver wrote into the second one's results"
    assert manifest_of(other.run) == manifest, "the first driver wrote the second one's record"
    assert_same_results(plain.run, other.run, "a run that was taken over differs")
    write_outcome(
        "a driver paused (SIGSTOP) in mid-run, replaced by one with another config, resumed",
        kills=1,
        recomputed=0,
        outcome="the second one's selection, bit for bit; the first stopped by itself (exit 2)",
        seconds=time.monotonic() - began,
    )


def test_results_are_not_written_by_a_driver_that_lost_the_run(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(setup, tmp_path / "run", method="random")
    real = Reducer.select

    def too_late(self: Reducer, owner: str | None = None) -> Any:
        monkeypatch.setattr(lease, "STALE_SECONDS", -1.0)
        monkeypatch.setattr(lease, "_is_here", lambda holder: False)
        lease.Lease(config.run).acquire(lambda text: None)
        return real(self, owner)

    monkeypatch.setattr(Reducer, "select", too_late)
    with pytest.raises(RunTakenError):
        run_select(config, quiet=True)
    written = {info.url.removeprefix(f"{config.run}/") for info in storage.list_objects(config.run)}
    left = {name for name in written if not name.startswith("cache/")}
    assert left == {"config.yaml", "driver.json", "manifest.json"}, "results of a lost run"
