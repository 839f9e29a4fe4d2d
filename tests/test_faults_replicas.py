"""Replicas that are killed at random moments, again and again, with the settings a user has."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
from faults import counting_factory, lines_of, recomputed, recorded, replicas_of
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config

from influence import one_process
from ray_jobs import select as select_job

pytestmark = pytest.mark.usefixtures("ray_cluster")

KILLS = 20
#: Every stage in many small shards: some 200 units.
CHANGES = {
    "landmarks__choose": "certified",
    "landmarks__count": 4096,
    "landmarks__initial": 12,
    "landmarks__audit": 6,
    "replicas__rows_per_shard": 2,
    "replicas__gradient_rows_per_shard": 1,
}


def kill_on_the_way(log: Path, moments: list[int], seed: int, stages: list[str]) -> None:
    """SIGKILL one replica that is up, each time that so many units have ended, and a bit later."""
    draw = random.Random(seed)
    for moment in moments:
        while True:
            lines = lines_of(log)
            up = replicas_of(log)
            if up and sum(line.what != "begin" for line in lines) >= moment:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself meanwhile
            draw.choice(up).kill()
            stages.append(lines[-1].key.split("/")[0])


def test_twenty_replicas_killed_in_one_run(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_config(setup, tmp_path / "plain", **CHANGES)
    one_process.run_select(plain, quiet=True)
    units = sum(stage.shards for stage in manifest_of(plain.run).stages.values())
    config = tiny_config(setup, tmp_path / "killed", replicas__max=3, **CHANGES)
    log = tmp_path / "log"

    def take_a_moment(key: str) -> None:
        time.sleep(0.05)

    monkeypatch.setattr(select_job, "replica_factory", counting_factory(log, take_a_moment))
    moments = sorted(random.Random(5).sample(range(1, units - 10), KILLS))
    stages: list[str] = []
    thread = threading.Thread(target=kill_on_the_way, args=(log, moments, 6, stages), daemon=True)
    with recorded("SIGKILL of replicas at random moments") as fault:
        thread.start()
        select_job.run_select(config, quiet=True)
        thread.join(timeout=1)
        fault.kills = len(stages)
        fault.recomputed = recomputed(log)
        assert fault.kills >= KILLS, f"the job was over after {fault.kills} kills: test too weak"
        assert len(set(stages)) >= 3, f"killed in {set(stages)} alone: test too weak"
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        for name, stage in manifest_of(config.run).stages.items():
            assert not stage.failed, f"{name}: a unit was blamed for a kill from outside"
            assert stage.computed + stage.reused == stage.shards, f"{name}: a shard counts twice"
        assert_same_results(plain.run, config.run, "a killed replica changed the result")
        fault.outcome = "the same bytes, no shard failed"
