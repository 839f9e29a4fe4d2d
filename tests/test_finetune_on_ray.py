"""Fine-tuning on Ray Train: the same training for any number of workers, whatever may die."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file
from tiny_run import Setup, tiny_config

from influence import finetune_job
from influence.checkpoints import Checkpoints
from influence.errors import InputError, InterruptedRunError
from influence.training_record import TrainingRecord, read_record
from ray_jobs import finetune as finetune_on_ray

pytestmark = [pytest.mark.clusters, pytest.mark.usefixtures("ray_cluster")]

SECONDS = 180.0
#: The last step of an epoch has one row, so one of two workers has none. In float64 the rounding of
#: another order of sums cannot hide a wrong batch.
CHANGES: dict[str, Any] = {
    "finetune__data": "pool",
    "finetune__dtype": "float64",
    "finetune__batch_size": 4,
    "finetune__learning_rate": 0.005,
    "finetune__epochs": 12,
    "finetune__save_every": 5,
    "finetune__rank": 4,
    "data__limit": 41,
}


def adapter_of(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "adapter_model.safetensors")


def workers() -> list[psutil.Process]:
    """The processes of Ray Train's workers."""
    children = psutil.Process(os.getpid()).children(recursive=True)
    return [each for each in children if "RayTrainWorker" in " ".join(each.cmdline())]


class Strike(threading.Thread):
    """Sends a signal once a checkpoint after `step` is committed: to this process, or a worker."""

    def __init__(self, output: Path, step: int, *, worker: bool) -> None:
        super().__init__(daemon=True)
        self._checkpoints = Checkpoints(str(output))
        self._step, self._worker = step, worker
        self.struck_at = 0
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            newest = max(self._checkpoints.steps(), default=0)
            if newest > self._step and (found := workers()):
                self.struck_at = newest
                if self._worker:
                    found[-1].send_signal(signal.SIGKILL)
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.02)


def test_two_workers_are_as_good_as_one_and_may_be_stopped_and_killed(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tiny_config(setup, tmp_path / "one", **CHANGES)
    alone = finetune_job.run_finetune(one, quiet=True)
    two = tiny_config(setup, tmp_path / "two", **CHANGES, finetune__workers=2)
    output = tmp_path / "two" / "finetune"

    stop = Strike(output, 0, worker=False)
    with pytest.raises(InterruptedRunError):
        finetune_on_ray.run_finetune(two)
    assert stop.struck_at
    _, alive = psutil.wait_procs(workers(), timeout=SECONDS)
    assert not alive, "workers go on training for a driver that was told to stop"
    stopped = read_record(str(output))
    assert stopped is not None
    assert stopped.state == "interrupted"
    newest = Checkpoints(str(output)).steps()[-1]
    capsys.readouterr()

    kill = Strike(output, newest, worker=True)
    both = finetune_on_ray.run_finetune(two)
    told = capsys.readouterr().err
    assert kill.struck_at > newest, "nobody was killed: the test shows nothing"
    begun = [int(step) for step in re.findall(r"training: 132 steps, .* from step (\d+) on", told)]
    assert begun[0] == newest, "the stopped training was not gone on from its newest checkpoint"
    assert begun[1] >= kill.struck_at, "nor was that of the dead worker"
    assert "step 132: sums loss" in told, "the driver does not show what the workers say"
    assert (alone.workers, both.workers) == (1, 2)
    assert both.total_steps == alone.total_steps == 132
    assert both.tokens == alone.tokens, "a row is lost or trained on twice"
    losses = [[step.loss for step in record.steps] for record in (alone, both)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, err_msg="other batches")
    compare_evaluations(alone, both)
    first, second = (adapter_of(tmp_path / name / "finetune") for name in ("one", "two"))
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=0, atol=1e-8, err_msg=name)


def compare_evaluations(alone: TrainingRecord, both: TrainingRecord) -> None:
    assert [each.step for each in both.evaluations] == [each.step for each in alone.evaluations]
    for one, other in zip(alone.evaluations, both.evaluations, strict=True):
        for name, found in other.sets.items():
            expected = one.sets[name]
            assert (found.rows, found.response_tokens) == (expected.rows, expected.response_tokens)
            assert found.loss == pytest.approx(expected.loss, rel=1e-9)


def test_an_error_that_every_attempt_would_meet_ends_the_job_with_its_own_text(
    setup: Setup, tmp_path: Path
) -> None:
    changes = {"finetune__learning_rate": 1e200, "finetune__max_grad_norm": 1e300}
    config = tiny_config(setup, tmp_path / "run", **{**CHANGES, **changes})
    with pytest.raises(InputError, match=r"the loss of step \d+ is (nan|inf)"):
        finetune_on_ray.run_finetune(config, quiet=True)
    record = read_record(str(tmp_path / "run" / "finetune"))
    assert record is not None
    assert record.state == "failed"
