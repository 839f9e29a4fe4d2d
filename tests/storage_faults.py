"""What tests of storage faults share: what is computed twice, and where outcomes are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DRIVER = Path(__file__).parent / "counted_driver.py"


def write_outcome(fault: str, *, kills: int, recomputed: int, seconds: float, **more: Any) -> None:
    """One line of the table of faults, where INFLUENCE_FAULTS_OUT names a file."""
    path = os.environ.get("INFLUENCE_FAULTS_OUT")
    if not path:
        return
    row = {
        "fault": fault,
        "runs": more.pop("runs", 1),
        "kills": kills,
        "recomputed": recomputed,
        "outcome": more.pop("outcome", "the selection of an undisturbed run, bit for bit"),
        "seconds": round(seconds, 1),
        **more,
    }
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def computations(log: Path) -> list[tuple[str, float]]:
    """(key, when) of every unit that `counted_driver` began to compute."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(line["key"], line["time"]) for line in lines]


def computed_again(log: Path, created: dict[str, float]) -> list[str]:
    """Keys of the shards that were computed once more after the store had created them."""
    committed = {key.split("/cache/")[1]: when for key, when in created.items() if "/cache/" in key}
    computed = computations(log)
    assert computed, "nothing was computed: test too weak"
    missing = {key for key, _ in computed} - committed.keys()
    assert not missing, f"computed, but the store never confirmed them: {missing}"
    return [key for key, when in computed if when > committed[key]]


def run_driver(
    config: str, log: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`influence select CONFIG ARGUMENTS` in a process of its own, its computations in `log`."""
    return subprocess.run(
        [sys.executable, str(DRIVER), str(log), config, *arguments],
        env=driver_environment() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def start_driver(
    config: str, log: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    """The same, without waiting for its end."""
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(log), config, *arguments],
        env=driver_environment() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def driver_environment() -> dict[str, str]:
    """The test's own, with a Ray of the driver's own and this tree's code."""
    own = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return own | {"PYTHONPATH": str(ROOT)}


def wait_until(what: Any, seconds: float = 120.0) -> None:
    """Until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
