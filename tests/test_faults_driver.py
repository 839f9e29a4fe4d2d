"""A driver that is killed ten times at random moments, then told to stop, then left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from faults import lines_of, recomputed, recorded, replicas_of, wait_until
from ray_nodes import ON_LOOPBACK
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config, write_config

from influence import one_process

pytestmark = pytest.mark.clusters

KILLS = 10
SECONDS = 120.0
CHANGES = {
    "landmarks__choose": "certified",
    "landmarks__count": 4096,
    "landmarks__initial": 12,
    "landmarks__audit": 6,
    "replicas__rows_per_shard": 4,
    "replicas__gradient_rows_per_shard": 2,
}

#: Has everything imported, and forks a driver for every line that it reads: its output's file.
#: Arguments: config, the replicas' log.
DRIVERS = """
import os, sys, time
from pathlib import Path
from faults import counting_factory
from influence.cli import main
from ray_jobs import select

config, log = sys.argv[1:]

def take_a_moment(key):
    time.sleep(0.1)

select.replica_factory = counting_factory(Path(log), take_a_moment)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        output = os.open(line.strip(), os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        main(["select", config])
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Drivers:
    """Starts one driver after the other on a cluster that is there already."""

    def __init__(self, folder: Path, config: str, log: Path) -> None:
        (folder / "drivers.py").write_text(DRIVERS)
        tests = Path(__file__).parent
        environment = os.environ | {
            **ON_LOOPBACK,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        }
        self._folder, self._count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "drivers.py"), config, str(log)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> psutil.Process:
        """A new driver."""
        self._count += 1
        self._say(str(self._folder / f"output{self._count}"))
        return psutil.Process(int(self._hear()))

    def ended(self) -> int:
        """Waits for it; its exit code."""
        return int(self._hear())

    @property
    def output(self) -> str:
        """What the last one has printed."""
        return (self._folder / f"output{self._count}").read_text()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def ended_by_pid() -> Iterator[list[Drivers]]:
    """Drivers that are ended when the test is over."""
    started: list[Drivers] = []
    yield started
    for drivers in started:
        for process in psutil.Process(drivers.process.pid).children():
            process.kill()
        drivers.process.kill()
        drivers.process.wait(timeout=SECONDS)


def ended_units(log: Path) -> int:
    return sum(line.what in ("created", "replaced") for line in lines_of(log))


def wait_for_replicas_to_end(log: Path) -> None:
    """What may still commit a shard after its driver is gone."""
    _, alive = psutil.wait_procs(replicas_of(log), timeout=SECONDS)
    assert not alive, "replicas of a driver that is gone live on"


@pytest.mark.usefixtures("ray_cluster")
def test_ten_drivers_killed_one_stopped_and_the_last_one_ends_well(
    setup: Setup, tmp_path: Path, ended_by_pid: list[Drivers]
) -> None:
    plain = tiny_config(setup, tmp_path / "plain", **CHANGES)
    one_process.run_select(plain, quiet=True)
    planned = {k for s in manifest_of(plain.run).stages.values() for k in s.planned}
    config = tiny_config(setup, tmp_path / "run", **CHANGES)
    log = tmp_path / "log"
    drivers = Drivers(tmp_path, write_config(tmp_path / "config.yaml", config), log)
    ended_by_pid.append(drivers)
    draw = random.Random(9)
    moments = sorted(draw.sample(range(len(planned) - 5), KILLS))
    stop, stages = moments[KILLS // 2], set()
    with recorded(f"driver SIGKILLed at {KILLS} random moments", runs=KILLS + 2) as fault:
        for moment in [*moments, None]:  # None: in the middle of writing the results
            driver = drivers.start()
            if moment is None:
                wait_until("results", lambda d=driver: any(results(config.run)) or gone(d))
            else:
                wait_for_units(log, moment, driver)
                time.sleep(draw.uniform(0, 0.15))
            assert not gone(driver), f"the driver ended by itself:\n{drivers.output}"
            stages |= {line.key.split("/")[0] for line in lines_of(log)[-1:]}
            if moment == stop:
                stopped_by_sigterm(drivers, driver, log)
            else:
                driver.kill()
                assert drivers.ended() == -signal.SIGKILL
                fault.kills += 1
            wait_for_replicas_to_end(log)
        assert len(stages) >= 3, f"killed in {stages} alone: test too weak"
        drivers.start()
        assert drivers.ended() == 0, drivers.output
        made = manifest_of(config.run).stages.values()
        assert sum(stage.reused for stage in made) == len(planned), "a shard was not reused"
        fault.recomputed = recomputed(log)
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        assert_same_results(plain.run, config.run, "a run in twelve pieces differs")
        fault.outcome = "the same bytes, each driver goes on from the last one's shards"


def results(run: str) -> Iterator[Path]:
    """Files of the selection that are there."""
    yield from (path for name in ("scores", "selection") for path in Path(run, name).glob("part-*"))


def wait_for_units(log: Path, count: int, driver: psutil.Process) -> None:
    """Until so many units are committed, by all drivers together."""
    wait_until(f"{count} units", lambda: ended_units(log) >= count or gone(driver))


def stopped_by_sigterm(drivers: Drivers, driver: psutil.Process, log: Path) -> None:
    """Sends it; the driver ends with 130, and hands nothing out any more."""
    with recorded("SIGTERM to the driver") as fault:
        before = sum(line.what == "begin" for line in lines_of(log))
        driver.send_signal(signal.SIGTERM)
        assert drivers.ended() == 130, drivers.output
        assert "stopped by SIGTERM" in drivers.output
        assert "Traceback" not in drivers.output
        wait_for_replicas_to_end(log)
        after = sum(line.what == "begin" for line in lines_of(log))
        # What it handed out while the signal was on its way, at 50 ms a unit.
        assert after - before <= 6, f"{after - before} units were begun after the signal"
        fault.outcome = "exit 130, nothing more handed out; the next one goes on"


def gone(process: psutil.Process) -> bool:
    """Whether it has ended."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
