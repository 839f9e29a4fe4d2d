"""The command line: help that teaches, errors in one line, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from tiny_run import Setup, tiny_config, write_config

from influence import progress
from influence.candidates import SourceFile
from influence.cli import app, main
from influence.errors import InterruptedRunError
from influence.signals import stop_signals
from influence.units import Unit
from influence.worker import UnitResult

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)  # type: ignore[union-attr]


def run_cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli(["--help"], capsys)
    text = " ".join(out.split())
    assert code == 0
    for word in (*COMMANDS, "influence plan CONFIG", "Exit codes", "130"):
        assert word in text, f"--help does not teach {word!r}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_cli([command, "--help"], capsys)
    text = " ".join(out.split())
    assert code == 0
    argument = "RUN" if command in ("status", "report") else "CONFIG"
    assert argument in text, f"{command} --help does not say what it takes"
    assert "Exit codes" in text, f"{command} --help does not say how it ends"
    if argument == "CONFIG":
        assert "--set" in text
        assert "YAML" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("selektion.budget=5%", "unknown key 'selektion'; did you mean 'selection'?"),
        ("selection.buget=5%", "did you mean 'selection.budget'?"),
        ("method=influence_destillation", "did you mean 'influence_distillation'?"),
        ("replicas.max=many", "replicas.max:"),
        ("method", "expected KEY=VALUE"),
        ("method.name=x", "'method' holds"),
        ("selection.budget=-3", "selection.budget: -3"),
        ("selection.budget=5 apples", "selection.budget: '5 apples'"),
        ("landmarks.kernel=[1", "landmarks.kernel:"),
        ("model.api_key=abc", "credentials are never read from a config"),
        ("model.name=nobody/nothing", "model.name: 'nobody/nothing' is no folder"),
        ("targets.sums.path=nowhere.jsonl", "targets.sums.path: "),
        ("data.candidates=nowhere/*.parquet", "nowhere/*.parquet"),
        ("targets.mixed.group_by=famly", "group_by column 'famly'"),
        ("embedding.blocks=9", "embedding.blocks"),
    ],
)
def test_bad_values_end_in_one_line(
    setup: Setup,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    expected: str,
) -> None:
    config = tiny_config(setup, tmp_path / "run")
    path = write_config(tmp_path / "config.yaml", config)
    code, _, err = run_cli(["select", path, "--in-process", "--set", change], capsys)
    errors = err[err.index("error: ") :] if "error: " in err else err
    assert code == 2, f"exit code of bad input; stderr: {err}"
    assert expected in errors
    assert "Traceback" not in err
    assert len(errors.strip().splitlines()) == 1, f"not one line: {errors}"


def test_a_missing_config_and_a_broken_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gsm8k.yaml").write_text("run: [1\n")
    code, _, err = run_cli(["select", str(tmp_path / "gsm8.yaml")], capsys)
    assert code == 2
    assert "does not exist; did you mean" in err
    assert "gsm8k.yaml" in err
    code, _, err = run_cli(["select", str(tmp_path / "gsm8k.yaml")], capsys)
    assert code == 2
    assert "not valid YAML" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_without_a_run(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_cli([command, str(tmp_path)], capsys)
    assert code == 2, f"{command} on a folder that is no run: {err}"
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_plan_runs_no_model_and_status_follows_a_run(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(setup, tmp_path / "run")
    path = write_config(tmp_path / "config.yaml", config)
    code, out, err = run_cli(["plan", path], capsys)
    assert code == 0, err
    assert "embedding" in out
    assert not list((tmp_path / "run").glob("cache/embedding/*/*")), "plan computed embeddings"
    code, out, err = run_cli(["select", path, "--in-process"], capsys)
    assert code == 0, err
    for word in ("maths", "certificate", "selection.jsonl", "report.html"):
        assert word in out, f"the summary does not show {word}"
    code, out, err = run_cli(["status", config.run], capsys)
    assert code == 0, err
    assert "done" in out


def test_the_job_module_runs_as_a_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.select", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: config file"), done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [["plan"], ["select", "--in-process"]])
def test_a_stop_signal_is_no_model_that_does_not_load(
    setup: Setup,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    number: signal.Signals,
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        signal.raise_signal(number)

    before = signal.getsignal(number)
    path = write_config(tmp_path / "config.yaml", tiny_config(setup, tmp_path / "run"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stopped)
    code, _, err = run_cli([*command, path], capsys)
    assert code == 130, f"a stop signal was taken for another error: {err}"
    assert f"stopped by {number.name}" in err
    assert "Traceback" not in err
    assert signal.getsignal(number) is before, "the handler of the caller was not put back"


def test_a_second_signal_does_not_break_the_clean_up() -> None:
    cleaned = []

    def job() -> None:
        with stop_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned.append(True)

    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        job()
    assert cleaned, "the second signal cut off the writing of the manifest"


def test_an_exit_code_is_no_interruption() -> None:
    with pytest.raises(SystemExit, match="3"), stop_signals():
        sys.exit(3)
    with pytest.raises(KeyboardInterrupt), stop_signals():
        raise KeyboardInterrupt  # of somebody else: nothing was received


def test_progress_has_a_line_even_when_nothing_finishes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.05)
    shown = progress.Progress()
    shown.tick()
    with shown.working({"embedding": 7}, 0):
        shown.tick()
        assert "embedding 0/7" not in capsys.readouterr().err, "a line before it is due"
        time.sleep(0.1)
        shown.tick()
        shown.tick()
    time.sleep(0.1)
    shown.tick()
    assert capsys.readouterr().err.count("embedding 0/7 shards") == 1, "not one line per interval"


def test_the_speed_of_a_stage_is_that_of_its_own_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    shown = progress.Progress()
    file = SourceFile("/data/a.jsonl", "0" * 32, 8, 8)
    with shown.working({"embedding": 2, "gradients": 1}, 0):
        for stage, tokens, seconds in (("embedding", 900, 3.0), ("gradients", 50, 1.0)):
            unit = Unit(stage, "f" * 32, file, 0, 3)
            result = UnitResult("key", "created", 4, tokens, 0.0, seconds, "cpu")
            shown.advance(unit, result)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "embedding 300 tokens/s a replica, 1/2 shards" in last, "not tokens by model seconds"
    assert "gradients 50 tokens/s a replica, 1/1 shards" in last, "another stage's time counted"
