"""`influence status`: while a run is at work, after it, from another directory, in an S3 store."""

from __future__ import annotations

import io
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_run import Setup, manifest_of, tiny_config

from influence import run_log, storage
from influence.candidates import SourceFile
from influence.cli import main
from influence.config_loading import dump_config
from influence.job import Job
from influence.local import local_execute
from influence.one_process import run_select
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.records import Manifest, Pace, ReplicaCount, StageRecord, to_json
from influence.reducer import Reducer
from influence.resume import claim_run
from influence.status import Status, print_status, read_status, status_document
from influence.summary import stage_table
from influence.units import Bundle, Unit
from influence.watch import Watch
from influence.worker import UnitResult


def printed(status: Status) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_status(status, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def status_of(run: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `influence status RUN --json` prints."""
    with pytest.raises(SystemExit) as caught:
        main(["status", run, "--json"])
    assert not caught.value.code, f"exit code {caught.value.code} of a readable run"
    return json.loads(capsys.readouterr().out)


class Halting:
    """Lets a job in one process run until so many shards of a stage are there, then waits."""

    def __init__(self, job: Job, stage: str, shards: int) -> None:
        self.halted, self.go = threading.Event(), threading.Event()
        self._stage, self._left = stage, shards
        self._inner = local_execute(job.config, job.watch)

    def __call__(self, bundles: Any, on_result: Any, on_failure: Any, /) -> None:
        def counted(bundle: Bundle, results: list[UnitResult]) -> None:
            on_result(bundle, results)
            self._left -= bundle.units[0].stage == self._stage
            if self._left == 0 and not self.halted.is_set():
                self.halted.set()
                assert self.go.wait(60), "the test forgot to go on"

        self._inner(bundles, counted, on_failure)


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_run_at_work_says_how_far_it_is(
    where: str,
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    run = str(tmp_path / "run") if where == "folder" else request.getfixturevalue("s3_url") + "/run"
    monkeypatch.setattr(run_log, "_SAVE_EVERY_SECONDS", 0.0)
    config = tiny_config(setup, run, method="exact")
    claim_run(config)
    job = prepare(config, Progress(quiet=True))
    execute = Halting(job, "gradients", 3)
    thread = threading.Thread(target=select, args=(job, execute, Reducer(config)), daemon=True)
    thread.start()
    try:
        assert execute.halted.wait(120), "three shards of gradients never came"
        document = status_of(run, capsys)
        text = printed(read_status(run))
    finally:
        execute.go.set()
        thread.join(120)
    stage = document["stages"]["gradients"]
    assert document["state"] == "running"
    assert document["doing"] == "gradients"
    assert (stage["committed"], stage["missing"]) == (3, stage["shards"] - 3)
    assert stage["computed"] == 3, "the manifest is older than the shards"
    assert document["stages"]["catalogue"]["missing"] == 0
    assert 0 <= document["written_seconds_ago"] < 60
    for speeds in (document["since_start"], document["recent"]):
        assert speeds["samples_per_second"] > 0
        assert speeds["tokens_per_second"] > 0
    assert document["seconds_left"] is not None, "speed and missing tokens are known"
    assert document["replicas"]["up"] == 1
    assert document["replicas"]["up_seconds"] > stage["replica_seconds"] > stage["model_seconds"]
    assert 0 < document["model_share_of_up"] < document["model_share"] < 1
    for word in ("running (gradients)", "its last word was", " left ", "1 up, 0 awaited"):
        assert word in text, f"{word!r} is not shown:\n{text}"
    after = status_of(run, capsys)
    assert (after["state"], after["doing"], after["seconds_left"]) == ("done", None, None)
    assert all(stage["missing"] == 0 for stage in after["stages"].values())
    narrow = Console(file=io.StringIO(), width=80)
    print_status(read_status(run), narrow)
    text = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text, f"cut off on a terminal of 80 columns:\n{text}"


def test_a_finished_run_from_another_directory(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, cache in (("own", None), ("shared", "some/cache")):
        config = tiny_config(setup, f"runs/{name}", method="rds", cache=cache)
        run_select(config, quiet=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name in ("own", "shared"):
        document = status_of(str(tmp_path / "runs" / name), capsys)
        missing = {name: stage["missing"] for name, stage in document["stages"].items()}
        assert not any(missing.values()), f"{name}: the cache was looked for elsewhere: {missing}"
    (tmp_path / "runs" / "own").rename(tmp_path / "moved")
    document = status_of(str(tmp_path / "moved"), capsys)
    assert document["stages"]["embedding"]["missing"] == 0, "RUN/cache did not go along with RUN"


def test_watching_ends_with_the_run(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _write(tmp_path, Manifest(method="rds", started=_ago(60), written=_ago(1)))
    ended = Manifest(method="rds", state="done", started=_ago(60), written=_ago(0))

    def end() -> None:
        time.sleep(0.5)
        storage.put(storage.join(run, "manifest.json"), to_json(ended))

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(SystemExit) as caught:
        main(["status", run, "--json", "--watch", "0.1"])
    thread.join()
    assert not caught.value.code
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states[-1] == "done"
    assert states[:-1] == ["running"] * (len(states) - 1)
    assert len(states) >= 3, f"not looked at again and again: {states}"


def test_a_manifest_that_nobody_writes_any_more_says_so(tmp_path: Path) -> None:
    pace = Pace(samples_per_second=2.0, tokens_per_second=300.0, seconds_left=600.0)
    manifest = Manifest(method="exact", started=_ago(7200), written=_ago(3600), pace=pace)
    manifest.replicas = ReplicaCount(up=2, awaited=1, up_seconds=7000.0)
    text = printed(read_status(_write(tmp_path, manifest)))
    assert "its last word was 1 h 00 min ago (a long step, or killed" in text
    assert "the same command goes on" in text
    fresh = manifest.model_copy(update={"written": _ago(2)})
    text = printed(read_status(_write(tmp_path, fresh)))
    assert "killed" not in text
    assert "in the last minute 2.0 samples/s, 300 tokens/s" in text
    assert "replicas: 2 up, 1 awaited" in text
    assert "9 min 58 s left" in text, "the time since the last word was not taken off"


def test_a_manifest_of_an_earlier_version_has_a_status(tmp_path: Path) -> None:
    record = StageRecord(fingerprint="f", planned=["embedding/f/a-0-3.parquet"], model_seconds=3.0)
    old = json.loads(to_json(Manifest(method="rds", stages={"embedding": record})))
    for name in ("started", "written", "replicas", "pace", "doing", "cache"):
        del old[name]
    for name in ("replica_seconds", "set_up_seconds"):
        del old["stages"]["embedding"][name]
    run = _write(tmp_path, Manifest(method="rds"))
    storage.put(storage.join(run, "manifest.json"), json.dumps(old).encode())
    status = read_status(run)
    assert "running (or killed" in printed(status)
    document = status_document(status)
    assert document["stages"]["embedding"]["missing"] == 1
    assert document["written_seconds_ago"] is document["since_start"]["tokens_per_second"] is None
    assert document["model_share"] is None, "a share of a time that was not recorded"


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_the_share_of_time_in_the_model_is_that_of_the_time_with_work(tmp_path: Path) -> None:
    """Two replicas by hand: 10 s and 30 s with work, 8 s and 20 s of it in the model."""
    clock = Clock()
    log, progress = run_log.RunLog(str(tmp_path), "exact"), Progress(quiet=True, clock=clock)
    watch = Watch(log, progress, clock)
    log.manifest.stages["gradients"] = StageRecord(fingerprint="f")
    file = SourceFile("/data/a.jsonl", "0" * 32, 8, 8)
    bundles = [Bundle((Unit("gradients", "f" * 32, file, i, i),)) for i in range(2)]
    watch.replicas(2, 0)
    clock.now += 30.0
    for bundle, held, model in zip(bundles, (10.0, 30.0), (8.0, 20.0), strict=True):
        watch.held(bundle, held)
        watch.done(bundle, [UnitResult("key", "created", 1, 50, 1.0, model, "cpu")])
    watch.replicas(1, 0)
    clock.now += 20.0  # one replica is up and has nothing to do
    log.finish("done")
    manifest = manifest_of(str(tmp_path))
    assert manifest.stages["gradients"].model_share == pytest.approx(28 / 40)
    assert manifest.model_share == pytest.approx(28 / 40), "the idle time counts, and should not"
    assert manifest.replicas is not None
    assert manifest.replicas.up_seconds == pytest.approx(2 * 30 + 20)
    assert manifest.model_share_of_up == pytest.approx(28 / 80)
    console = Console(file=io.StringIO(), width=200)
    console.print(stage_table(manifest))
    table = console.file.getvalue()  # type: ignore[attr-defined]
    expected = (
        "models at work: 70.0% of the time with shards to compute (setting up: 5.0%), 35.0% of the "
        "time that replicas were up"
    )
    assert expected in " ".join(table.split())


def test_the_catalogue_is_no_time_of_a_model() -> None:
    stages = {
        "catalogue": StageRecord(fingerprint="c", replica_seconds=100.0),
        "embedding": StageRecord(fingerprint="e", replica_seconds=10.0, model_seconds=9.0),
    }
    manifest = Manifest(method="rds", stages=stages)
    assert stages["catalogue"].model_share is None
    assert manifest.model_share == pytest.approx(0.9), "time without a model was counted"


def _ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def _write(folder: Path, manifest: Manifest) -> str:
    run = str(folder / "run")
    config = tiny_config(
        Setup(folder, folder, [str(folder / "pool.jsonl")], {"t": {"path": "t"}}), run
    )
    storage.put(storage.join(run, "manifest.json"), to_json(manifest))
    storage.put(storage.join(run, "config.yaml"), dump_config(config).encode())
    return run
