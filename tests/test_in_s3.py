"""Run directory, cache and candidates in a real S3 store: the same results as on a disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3 import SECRET_KEY
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config, write_config

from influence import storage
from influence.one_process import run_select

pytestmark = pytest.mark.clusters


def test_a_run_in_s3_equals_one_on_a_disk(setup: Setup, tmp_path: Path, s3_url: str) -> None:
    local = tiny_config(setup, tmp_path / "local")
    run_select(local, quiet=True)
    for path in (setup.folder / "pool").iterdir():
        storage.put(f"{s3_url}/pool/{path.name}", path.read_bytes())
    remote = tiny_config(
        setup,
        f"{s3_url}/runs/tiny",
        cache=f"{s3_url}/cache",
        data__candidates=[f"{s3_url}/pool/*.parquet", f"{s3_url}/pool/*.jsonl"],
    )
    # A driver of its own: the session's Ray does not have the store's credentials.
    path = write_config(tmp_path / "config.yaml", remote)
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.select", path],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_results(local.run, remote.run, "the store changed the result")
    assert storage.head(f"{remote.run}/report.html") is not None
    written = b"".join(
        storage.read_bytes(f"{remote.run}/{name}")
        for name in ("config.yaml", "manifest.json", "report.html", "selection.jsonl")
    )
    assert SECRET_KEY.encode() not in written, "a credential was written into the run"
    run_select(remote, quiet=True)  # in one process, on what the replicas committed
    stages = manifest_of(remote.run).stages
    assert sum(stage.computed for stage in stages.values()) == 0, "shards in S3 were not reused"
    assert_same_results(local.run, remote.run, "a run on reused shards differs")
