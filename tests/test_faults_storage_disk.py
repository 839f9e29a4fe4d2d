"""A disk that is full: said so, nothing half-written, and the same command goes on once it is not.

The disk is a tmpfs of one mebibyte in a mount namespace of the test's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from storage_faults import computations, driver_environment, write_outcome
from tiny_run import Setup, assert_same_results, manifest_of, shards_in, tiny_config, write_config

from influence.cache import Cache
from influence.one_process import run_select

pytestmark = pytest.mark.clusters

STEP_KIBIBYTES = 20
MOST_STEPS = 20
DRIVER = """
import contextlib, io, json, os, shutil, subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from counted_driver import counted
import influence.local
from influence.cli import main
from influence.worker import Worker

disk, config, out, step, most = sys.argv[2:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
filler = Path(disk, "filler")
influence.local.Worker = lambda config: counted(Worker(config), log)
for number in range(int(most)):
    filler.unlink(missing_ok=True)
    left, room = os.statvfs(disk), int(step) * (number + 1) * 1024
    filler.write_bytes(b"x" * max(0, left.f_bavail * left.f_bsize - room))
    log = str(Path(out, f"{number}.log"))
    Path(log).touch()
    text, code = io.StringIO(), None
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        try:
            main(["select", config, "--in-process"])
        except SystemExit as error:
            code = error.code
    shutil.copytree(Path(disk, "run"), Path(out, str(number)))
    Path(out, f"{number}.json").write_text(json.dumps({"code": code, "text": text.getvalue()}))
    if code == 0:
        break
"""


def whole(run: Path) -> None:
    """No file of the run, and no shard, is there in part."""
    cache = Cache(str(run / "cache"))
    for key in shards_in(run / "cache"):
        assert cache.verified(key), f"half-written: {key}"
    for path in run.glob("s*/*.parquet"):
        pq.read_table(path)
    for path in run.glob("*.json"):
        json.loads(path.read_bytes())
    if (run / "selection.jsonl").exists():
        assert len((run / "selection.jsonl").read_text().splitlines()) == 10
    yaml.safe_load((run / "config.yaml").read_bytes())
    left = [path.name for path in run.rglob("*") if "#" in path.name or ".probe" in path.name]
    assert not left, f"left over from writes that failed: {left}"


def said(ended: dict[str, Any], disk: Path) -> None:
    """Exit code and message of a command that found the disk full."""
    assert ended["code"] == 2, ended["text"]
    message = ended["text"][ended["text"].rindex("error: ") :]
    assert "the disk is full" in message
    assert f"error: {disk}/run/" in message, "the path is not named"
    assert "run the same command again" in message
    assert "Traceback" not in ended["text"]


def test_a_full_disk_is_said_and_the_same_command_goes_on(setup: Setup, tmp_path: Path) -> None:
    plain = tiny_config(setup, tmp_path / "plain")
    run_select(plain, quiet=True)
    planned = {key for stage in manifest_of(plain.run).stages.values() for key in stage.planned}
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    path = write_config(tmp_path / "config.yaml", tiny_config(setup, disk / "run"))
    began = time.monotonic()
    arguments = [str(Path(__file__).parent), str(disk), path, str(out)]
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", DRIVER),
            *(*arguments, str(STEP_KIBIBYTES), str(MOST_STEPS)),
        ],
        env=driver_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"this test mounts a tmpfs in a namespace:\n{done.stdout}"
    times = len(list(out.glob("*.json")))
    committed: set[str] = set()
    full_at: list[int] = []
    for number in range(times):
        run = out / str(number)
        ended = json.loads((out / f"{number}.json").read_text())
        computed = [key for key, _ in computations(out / f"{number}.log")]
        assert committed.isdisjoint(computed), "computed once more after it was committed"
        assert committed <= shards_in(run / "cache"), "a committed shard is gone"
        committed = shards_in(run / "cache")
        whole(run)
        if number < times - 1:
            said(ended, disk)
            full_at.append(len(committed))
    assert ended["code"] == 0, ended["text"]
    print(full_at, times)
    assert any(0 < count < len(planned) for count in full_at), "never full in mid-run"
    assert len(planned) in full_at, "never full while results were written"
    assert_same_results(plain.run, str(run), "a full disk changed the result")
    assert manifest_of(str(run)).state == "done"
    write_outcome(
        "a full disk, at every stage of a run: a little more room each time",
        runs=times,
        kills=len(full_at),
        recomputed=0,
        outcome="exit 2, naming the path, each time; then the selection of an undisturbed run",
        seconds=time.monotonic() - began,
    )
