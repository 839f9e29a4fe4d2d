"""The job on Ray: the same bytes for any number of replicas, and whatever dies under way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from faults import Fault, record
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    save_adapter,
    save_model,
    shards_in,
    tiny_config,
    write_config,
)

from influence import one_process
from influence.cli import main
from influence.config import Config
from influence.errors import ModelLoadError, ReducerLostError
from influence.worker import Worker
from ray_jobs import evaluate as evaluate_job
from ray_jobs import select as select_job
from ray_jobs.reducer_actor import RemoteReducer
from ray_jobs.replica_actor import replica_factory

pytestmark = [pytest.mark.clusters, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def in_one_process(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run that every other way of running must equal."""
    config = tiny_config(setup, tmp_path_factory.mktemp("one") / "run")
    one_process.run_select(config, quiet=True)
    return config.run


def test_the_embedding_that_is_chosen_does_not_depend_on_the_replicas(
    setup: Setup, tmp_path: Path
) -> None:
    """Nor does what is selected by it, or what the grid says of it."""
    section = {"pilot": 40, "landmarks": [12], "repeats": 2, "kernels": [], "damping": []}
    changes = {
        "embedding": {"kind": "auto", "pilot": 16},
        "evaluation": {"fidelity": {**section, "recalls": []}},
    }
    alone = tiny_config(setup, tmp_path / "alone", **changes)
    one_process.run_select(alone, quiet=True)
    config = tiny_config(setup, tmp_path / "run", replicas__min=2, replicas__max=2, **changes)
    select_job.run_select(config, quiet=True)
    assert manifest_of(config.run).embedding == manifest_of(alone.run).embedding
    assert_same_results(alone.run, config.run, "the chosen embedding depends on the replicas")
    found = evaluate_job.run_evaluate(config, quiet=True)["fidelity"]["settings"]
    assert one_process.run_evaluate(alone, quiet=True)["fidelity"]["settings"] == found


@pytest.mark.parametrize("replicas", [1, 3])
def test_results_do_not_depend_on_the_replicas(
    setup: Setup, tmp_path: Path, in_one_process: str, replicas: int
) -> None:
    config = tiny_config(setup, tmp_path / "run", replicas__min=replicas, replicas__max=replicas)
    select_job.run_select(config, quiet=True)
    assert_same_results(
        in_one_process, config.run, "a row's numbers depend on where it is computed"
    )
    assert (Path(config.run) / "report.html").stat().st_size > 10_000
    manifest = manifest_of(config.run)
    assert all(stage.computed == stage.shards for stage in manifest.stages.values())
    assert manifest.bill is not None
    assert manifest.bill.replicas == min(replicas, os.cpu_count() or 1)
    for name in ("embedding", "gradients"):
        stage = manifest.bill.stages[name]
        assert stage.took is not None
        for what in ("shards", "rows", "tokens", "flops", "objects"):
            planned, took = getattr(stage.planned, what), getattr(stage.took, what)
            assert took == planned, f"{name}: {what} planned {planned}, took {took}"
    assert manifest.bill.total.took is not None
    assert manifest.replicas is not None
    paid = manifest.bill.total.took.node_hours * 3600 / manifest.bill.nodes * manifest.bill.replicas
    assert 0.5 < paid / manifest.replicas.up_seconds <= 1, "the bill misses replicas that were up"


CERTIFIED: dict[str, Any] = {
    "landmarks__choose": "certified",
    "landmarks__count": 4096,
    "landmarks__initial": 12,
    "landmarks__audit": 6,
}


def test_certified_rounds_do_not_depend_on_the_replicas(setup: Setup, tmp_path: Path) -> None:
    changes = {**CERTIFIED, "replicas__gradient_rows_per_shard": 3}
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    one_process.run_select(plain, quiet=True)
    config = tiny_config(setup, tmp_path / "run", replicas__max=3, **changes)
    select_job.run_select(config, quiet=True)
    assert_same_results(plain.run, config.run, "the order of arrival changed a round's choice")


class Recorded:
    """Starts replicas and knows the process of each one that is up."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory
        self.pids: list[int] = []

    def __call__(self) -> Any:
        handle = self._factory()

        def note() -> None:
            self.pids.append(ray.get(handle.ready.remote())[1])

        threading.Thread(target=note, daemon=True).start()
        return handle


def kill_at(
    starts: list[Recorded], thresholds: list[tuple[Path, int]], log: list[int], over: list[bool]
) -> None:
    """SIGKILL every replica that is up whenever so many shards are committed below a folder."""
    killed: set[int] = set()
    for folder, threshold in thresholds:
        while len(list(folder.glob("*/*.parquet"))) < threshold or not (
            alive := set(starts[0].pids) - killed
        ):
            if over:
                return
            time.sleep(0.002)
        for pid in alive:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
                os.kill(pid, signal.SIGKILL)
                log.append(pid)


IN2CORE: dict[str, Any] = {"method": "in2core", "gradients__layer_dim": 16}


@pytest.mark.parametrize(
    "kind", [{"method": "exact"}, CERTIFIED, IN2CORE], ids=["exact", "certified", "in2core"]
)
def test_replicas_killed_in_mid_shard(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    changes = {**kind, "replicas__gradient_rows_per_shard": 1}
    if kind is IN2CORE:
        changes["model__adapter"] = save_adapter(tmp_path / "adapter", setup.model)
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    one_process.run_select(plain, quiet=True)
    shards = len(list(Path(plain.cache_url, "gradients").glob("*/*.parquet")))
    config = tiny_config(setup, tmp_path / "killed", replicas__max=2, **changes)
    starts: list[Recorded] = []

    def recorded(given: Config) -> Recorded:
        starts.append(Recorded(replica_factory(given)))
        return starts[-1]

    monkeypatch.setattr(select_job, "replica_factory", recorded)
    deaths: list[int] = []
    over: list[bool] = []

    def killer() -> None:
        while not starts:
            time.sleep(0.01)
        # The later one is in a round after the first, where there are rounds, and for DataInf there
        # is one in its partial sums.
        gradients, sums = Path(config.cache_url, "gradients"), Path(config.run, "scoring/curvature")
        thresholds = [(gradients, shards // 6), (gradients, 3 * shards // 5), (sums, 5)]
        kill_at(starts, thresholds, deaths, over)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    select_job.run_select(config, quiet=True)
    over.append(True)
    thread.join(timeout=1)
    assert len(deaths) >= 2, "the job was over before its replicas were killed: test too weak"
    assert_same_results(plain.run, config.run, "a killed replica changed the result")
    for name, stage in manifest_of(config.run).stages.items():
        assert stage.computed + stage.reused == stage.shards, f"{name}: a shard is counted twice"
        assert not stage.failed
        # A shard whose replica died between its commit and its answer is found, not made anew.
        assert stage.reused <= 3 * len(deaths)


def test_a_poisoned_shard_is_named_and_the_rest_is_committed(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_one_process: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(setup, tmp_path / "run", replicas__retries=1)
    path = write_config(tmp_path / "config.yaml", config)

    def poisoned(given: Config) -> Callable[[], Any]:
        class Poisoned:  # local, so that it travels by value
            def __init__(self, document: dict[str, Any]) -> None:
                self.worker = Worker(Config.model_validate(document))

            def ready(self) -> None: ...

            def run(self, bundle: Any) -> Any:
                unit = bundle.units[0]
                if unit.stage == "embedding" and unit.first == 16 and "a.parquet" in unit.file.url:
                    raise FloatingPointError("this shard is poison")
                return self.worker.run(bundle)

        actor: Any = ray.remote(max_restarts=0)(Poisoned).options(num_cpus=1)
        document = given.model_dump(mode="json")
        return lambda: actor.remote(document)

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(select_job, "replica_factory", poisoned)
        with pytest.raises(SystemExit) as caught:
            main(["select", path])
    assert caught.value.code == 3, "exit code of a run with failed shards"
    text = capsys.readouterr().err
    assert "a.parquet rows 16-31 (2 attempts): FloatingPointError: this shard is poison" in text
    assert "Traceback" not in text
    manifest = manifest_of(config.run)
    assert manifest.state == "failed"
    (failed,) = manifest.stages["embedding"].failed
    committed = shards_in(config.cache_url)
    planned = {key for stage in manifest.stages.values() for key in stage.planned}
    assert planned - committed == {failed.key}, "shards other than the poisoned one are missing"
    with pytest.raises(SystemExit) as caught:
        main(["select", path])  # mended: the same command goes on
    assert caught.value.code == 0
    stages = manifest_of(config.run).stages
    assert {name: stage.computed for name, stage in stages.items() if stage.computed} == {
        "embedding": 1
    }, "the second run did more than the missing shard"
    assert_same_results(in_one_process, config.run, "a run that went on after a failure differs")
    ended = "exit 3, the shard is named, all others committed; mended: the same bytes"
    took = round(time.monotonic() - start, 1)
    record(Fault("a poisoned shard", 2, outcome=ended, seconds=took))


def test_a_model_that_does_not_load_stops_the_job_with_its_cause(
    setup: Setup, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config = tiny_config(setup, tmp_path / "run", model__name=str(folder), method="rds")
    with pytest.raises(ModelLoadError, match=r"model\.name: cannot load the model of") as caught:
        select_job.run_select(config, quiet=True)
    assert caught.value.exit_code == 2
    assert str(folder) in str(caught.value)
    assert manifest_of(config.run).state == "failed"


def test_a_lost_reducer_ends_the_job_and_the_same_command_goes_on(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_one_process: str,
) -> None:
    config = tiny_config(setup, tmp_path / "run")

    class Dying(RemoteReducer):
        def __getattr__(self, method: str) -> Any:
            if method == "choose_landmarks":
                ray.kill(self._actor)
            return super().__getattr__(method)

    with monkeypatch.context() as patch:
        patch.setattr(select_job, "RemoteReducer", Dying)
        with pytest.raises(ReducerLostError, match="the same command goes on") as caught:
            select_job.run_select(config, quiet=True)
    assert caught.value.exit_code == 3
    assert manifest_of(config.run).state == "failed"
    select_job.run_select(config, quiet=True)
    assert manifest_of(config.run).stages["catalogue"].computed == 0, "the catalogue was made anew"
    assert_same_results(in_one_process, config.run, "a run after a lost reducer differs")
