"""Drivers that are killed, told to stop, or started again with another config."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    shards_in,
    tiny_config,
    write_config,
)

from influence import local, run_log, stages, storage
from influence.cli import main
from influence.errors import ShardsFailedError, StorageError
from influence.one_process import run_select
from influence.run_log import RunLog

pytestmark = pytest.mark.clusters

Start = Callable[[str], subprocess.Popen]
SECONDS = 300.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(config path) -> a driver with an embedded Ray of its own; ended by pid at the end."""
    started: list[subprocess.Popen] = []

    def begin(config: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.select", config],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            kill_with_children(process)


def actors_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The driver's actors: what may still commit a shard after the driver is gone.

    Not Ray's agents: they notice a killed driver after a minute only, and touch no file of a run.
    """
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "Actor" in " ".join(child.cmdline())]


def kill_with_children(process: subprocess.Popen) -> None:
    """SIGKILL a driver, then wait until its actors have ended by themselves."""
    actors = actors_of(process)
    process.kill()
    process.wait(timeout=SECONDS)
    _, alive = psutil.wait_procs(actors, timeout=SECONDS)
    assert not alive, f"actors of a killed driver live on: {[p.cmdline() for p in alive]}"


def wait_for_shards(process: subprocess.Popen, cache: str, stage: str, count: int) -> None:
    """Until `count` shards of a stage are committed."""
    deadline = time.monotonic() + SECONDS
    while sum(key.startswith(stage) for key in shards_in(cache)) < count:
        if process.poll() is not None:
            output = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the driver ended with {process.returncode}:\n{output}")
        assert time.monotonic() < deadline, f"no {count} shards of {stage} in {SECONDS} s"
        time.sleep(0.005)


def test_a_driver_killed_then_stopped_then_left_alone(
    setup: Setup, tmp_path: Path, start: Start
) -> None:
    changes: dict[str, Any] = {"method": "exact", "replicas__gradient_rows_per_shard": 1}
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    run_select(plain, quiet=True)
    config = tiny_config(setup, tmp_path / "run", **changes)
    path = write_config(tmp_path / "config.yaml", config)
    planned = {k for s in manifest_of(plain.run).stages.values() for k in s.planned}

    first = start(path)
    wait_for_shards(first, config.cache_url, "gradients", 10)
    kill_with_children(first)
    after_kill = shards_in(config.cache_url)
    assert after_kill < planned, "the driver was killed too late: nothing is left to do"

    second = start(path)
    more = sum(key.startswith("gradients") for key in after_kill) + 5
    wait_for_shards(second, config.cache_url, "gradients", more)
    actors = actors_of(second)
    assert actors, "the replicas were not found: the count below would be too early"
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=SECONDS)
    assert second.returncode == 130, f"exit code of an interrupted run; output:\n{output}"
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert manifest_of(config.run).state == "interrupted"
    psutil.wait_procs(actors, timeout=SECONDS)
    after_stop = shards_in(config.cache_url)
    assert after_kill < after_stop < planned, "stopped too late, or committed shards were lost"

    third = start(path)
    output, _ = third.communicate(timeout=SECONDS)
    assert third.returncode == 0, output
    stages_of_run = manifest_of(config.run).stages
    computed = sum(stage.computed for stage in stages_of_run.values())
    assert computed == len(planned - after_stop), "more, or less, than the missing was computed"
    reused = sum(stage.reused for stage in stages_of_run.values())
    assert reused == len(after_stop), "a committed shard was not reused"
    assert_same_results(plain.run, config.run, "a run in three pieces differs from one in one")


def test_a_changed_config_is_refused_and_replaced_on_request(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(setup, tmp_path / "run", method="random")
    path = write_config(tmp_path / "config.yaml", config)
    arguments = ["select", path, "--in-process"]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    before = (tmp_path / "run" / "selection.jsonl").read_bytes()
    capsys.readouterr()
    changed = [*arguments, "--set", "seed=7", "--set", "selection.budget=4"]
    with pytest.raises(SystemExit) as caught:
        main(changed)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "seed: was 0, now 7" in error, "both values have to be printed"
    assert "selection.budget: was 10, now 4" in error
    assert "Traceback" not in error
    assert (tmp_path / "run" / "selection.jsonl").read_bytes() == before, "a refusal changed files"
    with pytest.raises(SystemExit, match="0"):
        main([*changed, "--replace"])
    assert len((tmp_path / "run" / "selection.jsonl").read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="0"):
        main([*changed, "--set", "replicas.retries=9"])  # changes no number: not refused


def test_one_process_names_a_failed_shard_and_goes_on_later(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_config(setup, tmp_path / "plain", method="rds")
    run_select(plain, quiet=True)
    config = tiny_config(setup, tmp_path / "run", method="rds", replicas__retries=2)
    embed, calls = stages.embed, []

    def poisoned(tools: Any, batches: Any, *asked: Any) -> Any:
        # Only the target `sums` has five rows.
        if sum(len(batch.positions) for batch in batches) == 5:
            calls.append(1)
            raise FloatingPointError("this shard is poison")
        return embed(tools, batches, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "embed", poisoned)
        with pytest.raises(ShardsFailedError) as caught:
            run_select(config, quiet=True)
    assert caught.value.exit_code == 3
    assert len(calls) == 3, "a unit has one attempt and two retries"
    manifest = manifest_of(config.run)
    assert manifest.state == "failed"
    (failed,) = manifest.stages["embedding"].failed
    assert failed.error == "FloatingPointError: this shard is poison"
    planned = {key for stage in manifest.stages.values() for key in stage.planned}
    assert planned - shards_in(config.cache_url) == {failed.key}
    run_select(config, quiet=True)
    assert manifest_of(config.run).stages["embedding"].computed == 1
    assert_same_results(plain.run, config.run, "a run that went on after a failure differs")


#: A driver whose replicas (or whose reducer) never answer; arguments: config, file to touch, which.
DRIVER = """
import sys, time
from pathlib import Path
import ray
from influence.cli import main
from ray_jobs import reducer_actor, select

config, touched, which = sys.argv[1:]

class Endless:
    def __init__(self, *arguments): ...
    def ready(self): ...
    def run(self, bundle): self.call()
    def call(self, *arguments):
        Path(touched).touch()
        time.sleep(3600)

endless = ray.remote(max_restarts=0)(Endless)
if which == "replica":
    select.replica_factory = lambda config: endless.options(num_cpus=1).remote
else:
    reducer_actor.ReducerActor = endless
main(["select", config])
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's files (sockets: a short path) that names a cluster that is not ours."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    ("which", "number"), [("replica", signal.SIGTERM), ("reducer", signal.SIGINT)]
)
def test_a_signal_in_the_middle_of_a_long_call_ends_the_job_at_once(
    setup: Setup, tmp_path: Path, ray_folder: Path, which: str, number: signal.Signals
) -> None:
    config = tiny_config(setup, tmp_path / "run", method="rds")
    path = write_config(tmp_path / "config.yaml", config)
    touched, output = tmp_path / "touched", tmp_path / "output"
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(ray_folder), "PYTHONPATH": str(Path(__file__).parent.parent)}
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "driver.py"), path, str(touched), which],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + SECONDS
        while not touched.exists():
            assert process.poll() is None, f"joined a cluster of others?\n{output.read_text()}"
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        time.sleep(0.5)  # now the driver waits
        process.send_signal(number)
        # Nobody knows how busy the machine is: far less than the hour of the call is enough.
        process.wait(timeout=SECONDS)
    finally:
        if process.poll() is None:
            kill_with_children(process)
    text = output.read_text()
    assert process.returncode == 130, f"exit code of an interrupted run; output:\n{text}"
    assert f"stopped by {number.name}" in text
    assert "Traceback" not in text
    assert "Token authentication" not in text, "noise at the start of an embedded Ray"
    assert manifest_of(config.run).state == "interrupted"


def failing_put(
    monkeypatch: pytest.MonkeyPatch, name: str, fails: Callable[[str, int], bool]
) -> list[str]:
    """Let `storage.NAME` fail where `fails(url, number of the call)`; the URLs it failed."""
    real, calls, failed = getattr(storage, name), [], []

    def call(url: str, *arguments: Any) -> Any:
        calls.append(url)
        if fails(url, calls.count(url)):
            failed.append(url)
            raise StorageError(f"{url}: bucket 'b' at http://store cannot be reached")
        return real(url, *arguments)

    monkeypatch.setattr(storage, name, call)
    return failed


def test_one_process_survives_hiccups_of_the_store(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_config(setup, tmp_path / "plain", method="rds")
    run_select(plain, quiet=True)
    config = tiny_config(setup, tmp_path / "run", method="rds", replicas__retries=1)
    monkeypatch.setattr(local, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(run_log, "_SAVE_EVERY_SECONDS", 0.0)
    shards = failing_put(monkeypatch, "put_new", lambda url, n: "/embedding/" in url and n == 1)
    writes = failing_put(monkeypatch, "put", lambda url, n: "manifest.json" in url and n in (3, 4))
    run_select(config, quiet=True)
    assert len(shards) == manifest_of(config.run).stages["embedding"].shards, "test too weak"
    assert len(writes) == 2, "the manifest was not written again after a failed write"
    assert manifest_of(config.run).state == "done"
    assert_same_results(plain.run, config.run, "a hiccup of the store changed the result")


def test_only_the_first_and_the_last_write_of_the_manifest_have_to_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_put(monkeypatch, "put", lambda url, n: n in (1, 3, 4, 5))
    said: list[str] = []
    log = RunLog(str(tmp_path), "random", said.append)
    with pytest.raises(StorageError):
        log.save()  # 1: nothing was recorded yet
    log.save()
    log.save()
    log.save()
    assert log.failed_writes == 2
    assert "2 failed so far" in said[1]
    assert "bucket 'b' at http://store" in said[1], "the user is not told what fails"
    with pytest.raises(StorageError):
        log.finish("done")
    log.finish("done")
    assert manifest_of(str(tmp_path)).state == "done"
