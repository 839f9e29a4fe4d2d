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

pytestmark = [pytest.mark.clusters, pytest.mark.usefixtures("ray_cluster")]

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


class Killer(threading.Thread):
    """SIGKILLs one replica that is up, each time that so many units have ended, and a bit later.

    Attributes:
        stages: for each kill, the stage that the run was in.
    """

    def __init__(self, log: Path, moments: list[int], seed: int) -> None:
        super().__init__(daemon=True)
        self._log, self._moments, self._draw = log, moments, random.Random(seed)
        self._killed: set[int] = set()
        self.stages: list[str] = []
        self.over = threading.Event()

    def run(self) -> None:
        for moment in self._moments:
            while sum(line.what != "begin" for line in lines_of(self._log)) < moment:
                if self.over.wait(0.01):
                    return
            time.sleep(self._draw.uniform(0, 0.1))
            while not self._kill():
                if self.over.wait(0.01):
                    return

    def _kill(self) -> bool:
        up = [process for process in replicas_of(self._log) if process.pid not in self._killed]
        if not up:
            return False
        victim = self._draw.choice(up)
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself meanwhile
            victim.kill()
            self._killed.add(victim.pid)
            self.stages.append(lines_of(self._log)[-1].key.split("/")[0])
            return True
        return False


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
    killer = Killer(log, moments, 6)
    with recorded("SIGKILL of replicas at random moments") as fault:
        killer.start()
        try:
            select_job.run_select(config, quiet=True)
        finally:
            killer.over.set()
            killer.join()
        fault.kills = len(killer.stages)
        fault.recomputed = recomputed(log)
        assert fault.kills >= KILLS, f"the job was over after {fault.kills} kills: test too weak"
        stages = set(killer.stages)
        assert len(stages) >= 3, f"killed in {stages} alone: test too weak"
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        for name, stage in manifest_of(config.run).stages.items():
            assert not stage.failed, f"{name}: a unit was blamed for a kill from outside"
            assert stage.computed + stage.reused == stage.shards, f"{name}: a shard counts twice"
        assert_same_results(plain.run, config.run, "a killed replica changed the result")
        fault.outcome = "the same bytes, no shard failed"
