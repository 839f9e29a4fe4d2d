"""The fine-tuning job: what a config trains on, drivers that die, and what a user is told."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import Runner, Setup, selection_of, tiny_config, write_config

from influence import storage
from influence.checkpoints import Checkpoints, fetch_adapter
from influence.cli import main
from influence.errors import RunBusyError, RunTakenError
from influence.finetune_job import run_finetune
from influence.lease import Lease, driving
from influence.training_progress import TrainingProgress
from influence.training_record import read_record

pytestmark = pytest.mark.clusters

SECONDS = 120.0
QUICK: dict[str, Any] = {
    "finetune__learning_rate": 0.02,
    "finetune__batch_size": 4,
    "finetune__rank": 4,
}
UNTRAINABLE = {
    "malformed json": 1,
    "no assistant turn": 1,
    "empty response": 1,
    "malformed: no recognised columns": 1,
}


def run_cli(
    config: str, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `influence finetune`."""
    with pytest.raises(SystemExit) as caught:
        main(["finetune", config, *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_a_selection_is_trained_on_with_its_weights(
    setup: Setup, run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selected = run(method="exact")
    weights = np.array([row["influence_weight"] for row in selection_of(selected)])
    config = tiny_config(setup, selected, method="exact", **QUICK)
    path = write_config(tmp_path / "config.yaml", config)
    code, out, err = run_cli(path, capsys)
    assert code == 0, err
    record = read_record(f"{selected}/finetune")
    assert record is not None
    assert record.rows.weighted
    assert record.rows.trained == len(weights) == 10
    effective = weights.sum() ** 2 / (weights**2).sum()
    assert record.rows.effective_rows == pytest.approx(effective, rel=1e-9)
    assert effective < 9.9, "the test no longer tells weights from none"
    for name in ("sums", "mixed"):
        before, *_, after = record.losses(name)
        assert (before or 0) > (after or 0), f"{name}: the targets are not what is evaluated"
        assert name in out
    assert f"adapter: {selected}/finetune" in out
    assert "rows to train on: 10 with their weights" in err
    code, _, err = run_cli(path, capsys)
    assert code == 0
    assert "done before" in err, "a finished training was done again"

    code, _, err = run_cli(path, capsys, "--set", "finetune.weights=false")
    assert code == 2
    assert "rows.content: was" in err, "a changed argument is not named"
    code, *_ = run_cli(path, capsys, "--set", "finetune.weights=false", "--replace")
    assert code == 0
    plain = read_record(f"{selected}/finetune")
    assert plain is not None
    assert plain.rows.effective_rows == 10
    assert plain.losses("sums") != record.losses("sums"), "weights have no effect"
    code, _, err = run_cli(path, capsys, "--set", "finetune.weights=false", "--in-process")
    assert code == 0, "the selection's own config was refused"


def test_a_pool_with_trouble_in_it_is_trained_on_and_counted(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"held": {"path": setup.targets["sums"]["path"], "limit": 3}}
    config = tiny_config(
        setup,
        tmp_path / "run",
        finetune__data="pool",
        finetune__evaluate=sets,
        finetune__output=str(tmp_path / "out"),
        finetune__max_length=40,
        **QUICK,
    )
    code, _, err = run_cli(write_config(tmp_path / "config.yaml", config), capsys)
    assert code == 0, err
    record = read_record(str(tmp_path / "out"))
    assert record is not None
    left_out = dict(record.rows.left_out)
    beyond = left_out.pop("no response tokens within max_length")
    assert left_out == UNTRAINABLE
    assert record.rows.trained == 72 - sum(UNTRAINABLE.values()) - beyond
    assert record.rows.truncated > 0
    for reason, count in record.rows.left_out.items():
        assert f"{reason}: {count}" in err, "left out without a word"
    assert record.evaluations[0].sets["held"].rows == 2
    assert "held: 1 of 3 rows have no loss" in err, "one is cut off before its response"
    assert record.epoch_steps == -(-record.rows.trained // 4)
    assert record.total_steps == 2 * record.epoch_steps


def test_of_two_drivers_one_trains_and_the_one_that_lost_it_writes_nothing_more(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(setup, tmp_path / "run", finetune__data="pool", **QUICK)
    output = f"{config.run}/finetune"
    with driving(output), pytest.raises(RunBusyError, match="written by another driver"):
        run_finetune(config, quiet=True)
    assert read_record(output) is None
    seen: list[str] = []

    def taken(_: Lease) -> None:
        record = read_record(output)
        assert record is not None
        seen.append(record.state)
        raise RunTakenError("taken")

    monkeypatch.setattr(Lease, "check", taken)
    with pytest.raises(RunTakenError):
        run_finetune(config, quiet=True)
    record = read_record(output)
    assert record is not None
    assert [record.state] == seen == ["running"], "it wrote into another driver's record"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finetune__data": None}, "finetune.data: {run} has no selection yet"),
        ({"finetune__data": ["nowhere/*.jsonl"]}, "finetune.data: nowhere/*.jsonl"),
        ({"finetune__data": ["{bad}"]}, "bad.jsonl row 1: influence_weight is -1"),
        ({"finetune__data": ["{good}", "{none}"]}, "none.jsonl: no column influence_weight"),
        ({"finetune__data": ["{empty}"]}, "none of the 1 rows can be trained on (empty response"),
        ({"finetune__evaluate": {"h": "{empty}"}}, "finetune.evaluate.h: none of the 1 rows"),
        ({"finetune__evaluate": {"h": "gone.jsonl"}}, "finetune.evaluate.h: gone.jsonl"),
        ({"finetune__workers": 2}, "finetune.workers: 2 workers need Ray"),
        ({"model__dtype": "float16"}, "finetune.dtype: the gradients of float16"),
        ({"finetune__adapter": "nowhere"}, "finetune.adapter: cannot tell whether 'nowhere' has"),
        ({"finetune__target_modules": ["q_prj"]}, "q_prj"),
    ],
)
def test_what_cannot_be_trained_ends_in_one_line(
    setup: Setup,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    expected: str,
) -> None:
    good = {"prompt": "a", "completion": "b", "influence_weight": 1.0}
    files = {
        "good": [good],
        "bad": [good, {**good, "influence_weight": -1}],
        "none": [{"prompt": "a", "completion": "b"}],
        "empty": [{"prompt": "a", "completion": ""}],
    }
    paths = {"run": str(tmp_path / "run")}
    for name, rows in files.items():
        paths[name] = str(tmp_path / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    filled = json.loads(_filled(json.dumps({"finetune__data": ["pool"], **changes}), paths))
    config = tiny_config(setup, tmp_path / "run", **filled)
    path = write_config(tmp_path / "config.yaml", config)
    code, out, err = run_cli(path, capsys, "--in-process")
    assert code == 2, out + err
    assert err.splitlines()[-1].startswith("error: "), err
    assert _filled(expected, paths) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "finetune" / "adapter_model.safetensors").exists()


def _filled(text: str, paths: dict[str, str]) -> str:
    for name, path in paths.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def newest_step(output: str) -> int:
    return max(Checkpoints(output).steps(), default=0)


def wait_for_step(process: subprocess.Popen, output: str, step: int) -> None:
    """Until a checkpoint of at least this step is committed."""
    deadline = time.monotonic() + SECONDS
    while newest_step(output) < step:
        if process.poll() is not None:
            text = process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the driver ended with {process.returncode}:\n{text}")
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {SECONDS} s"
        time.sleep(0.01)


def test_a_driver_killed_then_stopped_then_left_alone_with_its_output_in_s3(
    setup: Setup, tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    changes = {
        **QUICK,
        "finetune__data": "pool",
        "finetune__epochs": 14,
        "finetune__save_every": 7,
        "finetune__dropout": 0.1,
        "finetune__evaluate_every": 100,
    }
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    whole = run_finetune(plain, quiet=True)
    config = tiny_config(setup, tmp_path / "run", finetune__output=f"{s3_url}/out", **changes)
    path = write_config(tmp_path / "config.yaml", config)
    output = f"{s3_url}/out"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.finetune", path],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start()
    try:
        wait_for_step(first, output, 14)
        time.sleep(random.uniform(0, 0.3))
    finally:
        first.kill()
        first.communicate()
    killed_at = newest_step(output)
    assert killed_at < whole.total_steps, "killed too late: nothing is left to do"

    second = start()
    try:
        wait_for_step(second, output, killed_at + 7)
        second.send_signal(signal.SIGTERM)
        text, _ = second.communicate(timeout=SECONDS)
    finally:
        second.kill()
    assert second.returncode == 130, f"exit code of an interrupted training:\n{text}"
    assert f"from step {killed_at} on" in text, "it did not go on from the newest checkpoint"
    assert "stopped by SIGTERM" in text
    assert "Traceback" not in text
    record = read_record(output)
    assert record is not None
    assert record.state == "interrupted"

    third = start()
    text, _ = third.communicate(timeout=SECONDS)
    assert third.returncode == 0, text
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        one = (tmp_path / "plain" / "finetune" / name).read_bytes()
        assert one == storage.read_bytes(f"{output}/{name}"), f"{name}: three pieces are not one"
    record = read_record(output)
    assert record is not None
    assert record.evaluations == whole.evaluations
    assert Checkpoints(output).steps() == []
    folder = fetch_adapter(output, str(tmp_path / "fetched"))
    assert load_file(f"{folder}/adapter_model.safetensors").keys()


def test_progress_is_a_line_every_thirty_seconds() -> None:
    times = iter(range(0, 100_000, 10))
    out = io.StringIO()
    progress = TrainingProgress(
        console=Console(file=out, width=200), clock=lambda: float(next(times))
    )
    progress.begin(40, 100, 50)
    for step in range(41, 61):
        progress.step(step, 2.0 + step, 1000, 4.0)
    for rows in range(8):
        progress.evaluating("held", rows, 8)
    lines = out.getvalue().splitlines()
    assert lines[0] == "training: 100 steps, 50 an epoch from step 40 on"
    told = [line for line in lines if "tokens/s" in line]
    assert 4 <= len(told) <= 10, f"20 steps of 10 s or more, {len(told)} lines"
    match = "step 60 of 100, epoch 1.20, loss 62.0000; 250 tokens/s; 2 min 40 s left"
    assert progress.summary() == match
    assert any("evaluating held: " in line for line in lines), "a long evaluation says nothing"
