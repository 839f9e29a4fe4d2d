"""Scenes of a job that trains a model of its own first: a reference, or a warm-up."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import Setup, manifest_of, write_config

from influence.checkpoints import Checkpoints
from influence.config import Config
from influence.own_training import OwnTraining, own_training
from influence.plan_schemas import StageBill
from influence.status import print_status, read_status

SECONDS = 120.0


def own_of(config: Config) -> OwnTraining:
    """The training that the config's job makes."""
    own = own_training(config)
    assert own is not None
    return own


def bill_of(config: Config) -> StageBill:
    """What the training took in a run that is done, and what was planned."""
    bill = manifest_of(config.run).bill
    assert bill is not None
    return bill.stages[own_of(config).stage]


def in_other_places(setup: Setup, folder: Path) -> dict[str, Any]:
    """The same model and pool elsewhere, and fewer targets: of that no training depends."""
    shutil.copytree(setup.model, folder / "moved model")
    shutil.copytree(setup.folder / "pool", folder / "moved pool")
    return {
        "model__name": str(folder / "moved model"),
        "data__candidates": [f"{folder}/moved pool/{Path(p).name}" for p in setup.candidates],
        "targets": {"only": setup.targets["sums"]},
    }


def assert_it_took_what_was_planned(config: Config, planned: StageBill) -> None:
    """Of a run that made it; the status shows it."""
    stage, done = own_of(config).stage, bill_of(config)
    assert done.took is not None
    for what in ("shards", "rows", "tokens", "flops", "objects"):
        expected, took = getattr(planned.planned, what), getattr(done.took, what)
        assert expected, f"{what} is not in the plan"
        assert expected == took, f"{what}: planned {expected}, took {took}"
        assert getattr(done.planned, what) == expected, "the run's plan is another one"
    assert done.took.written_bytes == pytest.approx(planned.planned.written_bytes, rel=0.3)
    assert planned.planned.seconds > 0
    status = read_status(config.run)
    assert (status.planned(stage), status.committed[stage]) == (1, 1)
    console = Console(record=True, width=120)
    print_status(status, console)
    assert stage in console.export_text()


def kill_in_training(config: Config, folder: Path, *, steps: int) -> OwnTraining:
    """Run the job, and SIGKILL it once there is a checkpoint of so many steps."""
    own, path = own_of(config), write_config(folder / "config.yaml", config)
    checkpoints = Checkpoints(own.url)
    command = [sys.executable, "-m", "influence.cli", "select", path, "--in-process"]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + SECONDS
        while max(checkpoints.steps(), default=0) < steps:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert own.read() is None, f"killed too late: the {own.stage} is made"
    assert manifest_of(config.run).doing.startswith(own.stage), "the status does not tell"
    return own
