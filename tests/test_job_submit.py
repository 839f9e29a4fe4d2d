"""`ray job submit -- python -m ray_jobs.select CONFIG` against a local head, token required."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import Fault, record
from ray_head import Head, running_head
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    shards_in,
    tiny_config,
    write_config,
)

from influence.config_loading import dump_config
from influence.one_process import run_select

pytestmark = pytest.mark.clusters

ENTRYPOINT = ("python", "-m", "ray_jobs.select")
SECONDS = 300.0


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One head for the module: it outlives the jobs, as a cluster does."""
    with running_head() as started:
        yield started


def wait_for_shards(head: Head, submission: str, cache: str, count: int) -> None:
    """Until `count` gradient shards are committed."""
    deadline = time.monotonic() + SECONDS
    looked = 0.0
    while sum(key.startswith("gradients") for key in shards_in(cache)) < count:
        now = time.monotonic()
        assert now < deadline, f"no {count} shards in {SECONDS} s:\n{head.logs(submission)}"
        if now - looked > 1:
            looked, info = now, head.job(submission)
            assert info["status"] in ("PENDING", "RUNNING"), (
                f"the job ended too early: {info}\n{head.logs(submission)}"
            )
        time.sleep(0.005)


def test_stopped_in_mid_run_and_submitted_again(setup: Setup, tmp_path: Path, head: Head) -> None:
    changes: dict[str, Any] = {"method": "exact", "replicas__gradient_rows_per_shard": 1}
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    run_select(plain, quiet=True)
    planned = {k for s in manifest_of(plain.run).stages.values() for k in s.planned}
    config = tiny_config(setup, tmp_path / "run", **changes)
    path = write_config(tmp_path / "config.yaml", config)

    start = time.monotonic()
    submitted = head.cli("submit", "--no-wait", "--submission-id", "first", "--", *ENTRYPOINT, path)
    assert submitted.returncode == 0, submitted.stdout
    wait_for_shards(head, "first", config.cache_url, 10)
    info = head.job("first")
    assert info["status"] == "RUNNING"
    assert shlex.split(info["entrypoint"]) == [*ENTRYPOINT, path]
    driver, actors = psutil.Process(int(info["driver_info"]["pid"])), head.actors()
    assert actors, "the replicas were not found: the count below would be too early"

    assert head.ask("POST", "/api/jobs/first/stop", {})[0] == 200
    info = head.ended("first", SECONDS)
    assert info["status"] == "STOPPED", f"the job did not end by being stopped: {info}"
    logs = head.cli("logs", "first").stdout
    assert "stopped by SIGTERM" in logs, f"killed before it could say so:\n{logs}"
    assert "Traceback" not in logs, logs
    assert manifest_of(config.run).state == "interrupted", "the run's record does not say so"
    _, alive = psutil.wait_procs([driver, *actors], timeout=SECONDS)
    assert not alive, f"live on after the job was stopped: {[p.cmdline() for p in alive]}"
    after_stop = shards_in(config.cache_url)
    assert after_stop < planned, "stopped too late: nothing is left to do"

    status, text = head.ask("POST", "/api/jobs/", {"entrypoint": "true", "submission_id": "first"})
    assert status != 200, "a submission id can be reused now: docs/cluster.md says otherwise"
    assert "first" in text

    again = head.cli("submit", "--submission-id", "second", "--", *ENTRYPOINT, path)
    assert again.returncode == 0, again.stdout
    assert "Job 'second' succeeded" in again.stdout
    assert f"selection: {config.run}/selection.jsonl" in again.stdout, "the logs are not streamed"
    stages = manifest_of(config.run).stages
    computed = sum(stage.computed for stage in stages.values())
    assert computed == len(planned - after_stop), "a shard was computed twice, or left out"
    reused = sum(stage.reused for stage in stages.values())
    assert reused == len(after_stop), "a committed shard was not reused"
    assert_same_results(plain.run, config.run, "a stopped and resubmitted run differs")
    assert "succeeded" in head.cli("status", "second").stdout
    took = round(time.monotonic() - start, 1)
    record(Fault("ray job stop, submitted again", 2, outcome="the same bytes", seconds=took))


def test_a_refused_config_ends_as_failed_with_its_exit_code(
    setup: Setup, tmp_path: Path, head: Head
) -> None:
    text = dump_config(tiny_config(setup, tmp_path / "run"))
    path = tmp_path / "config.yaml"
    path.write_text(text + "aws_secret_access_key: hunter2-not-shown\n")
    entrypoint = shlex.join([*ENTRYPOINT, str(path)])
    body = {"entrypoint": entrypoint, "submission_id": "refused"}
    status, answer = head.ask("POST", "/api/jobs/", body)
    assert status == 200, answer
    info = head.ended("refused", SECONDS)
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 2), info
    logs = head.logs("refused")
    assert "aws_secret_access_key: looks like a credential" in logs
    assert "hunter2" not in logs + json.dumps(info), "the secret reached the logs or the record"
    assert not (tmp_path / "run").exists(), "a refused run left files"


@pytest.mark.parametrize("token", [None, "0" * 32], ids=["no token", "a wrong token"])
def test_the_job_server_runs_nothing_without_the_token(
    tmp_path: Path, head: Head, token: str | None
) -> None:
    touched = tmp_path / "touched"
    body = {"entrypoint": f"touch {shlex.quote(str(touched))}", "submission_id": f"t{token}"}
    assert head.ask("GET", "/api/jobs/", token=token)[0] in (401, 403), "jobs can be listed"
    assert head.ask("POST", "/api/jobs/", body, token=token)[0] in (401, 403), "jobs are accepted"
    assert head.ask("POST", "/api/jobs/first/stop", {}, token=token)[0] in (401, 403)
    assert head.ask("GET", f"/api/jobs/t{token}")[0] == 404, "the refused job was recorded"
    assert not touched.exists()


def test_a_local_head_listens_on_loopback_only(head: Head) -> None:
    assert head.listening() <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
