"""The pool of replicas with toy actors: what fails, hangs or dies is found, the rest goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from influence.errors import InputError, ModelLoadError, StorageError, UnitError
from influence.observer import Silent
from ray_jobs import pool as pool_module
from ray_jobs.placement import PlacementWatch
from ray_jobs.pool import ReplicaPool


def toy(folder: Path) -> Callable[[], Any]:
    """A factory of actors whose units are (name, what happens): each attempt leaves a file.

    The class is local so that it travels by value: no worker has to import this module.
    """

    class Toy:
        def ready(self) -> int:
            return os.getpid()

        def run(self, unit: tuple[str, str]) -> str:
            name, kind = unit
            attempt = len(list(folder.glob(f"{name}.*"))) + 1
            (folder / f"{name}.{attempt}").touch()
            if kind == "raises late":
                time.sleep(0.3)  # what is in flight with it has finished
            if kind in ("raises", "raises late"):
                raise ValueError(f"{name} cannot be read")
            (folder / f"worked-{os.getpid()}").touch()
            if kind == "store once" and attempt == 1:
                raise StorageError("bucket 'pool' at http://store failed (503) and kept failing")
            if kind == "no store":
                raise StorageError("bucket 'pool' at http://store cannot be reached")
            if kind == "hopeless":
                raise UnitError(f"the loss of {name} is nan")
            if kind == "raises once" and attempt == 1:
                raise OSError("a moment's trouble")
            if kind == "kills":
                time.sleep(0.2)  # others are in flight with it
                os._exit(1)
            if kind == "hangs":
                time.sleep(3600)
            if kind == "no model":
                raise ModelLoadError("model.name: cannot load the model of 'x'")
            if kind in ("meets", "until released"):
                (folder / f"process-{os.getpid()}").touch()
            if kind == "meets":  # until two replicas hold such a unit
                until = time.monotonic() + 60
                while len(list(folder.glob("process-*"))) < 2 and time.monotonic() < until:
                    time.sleep(0.05)
            if kind == "until released":  # a file that says so
                until = time.monotonic() + 50
                while not (folder / "released").exists() and time.monotonic() < until:
                    time.sleep(0.05)
            time.sleep({"slow": 0.3, "two seconds": 2.0}.get(kind, 0.01))
            return f"{name} done"

    actor = ray.remote(max_restarts=0, max_task_retries=0)(Toy)
    return lambda: actor.options(num_cpus=1, max_concurrency=4).remote()  # type: ignore[attr-defined]


class Outcome:
    """What the pool reported."""

    def __init__(self) -> None:
        self.results: dict[str, str] = {}
        self.failures: dict[str, tuple[int, str]] = {}
        self.before_failure: dict[str, int] = {}

    def result(self, unit: tuple[str, str], value: str) -> None:
        assert unit[0] not in self.results | self.failures, f"{unit[0]} was reported twice"
        self.results[unit[0]] = value

    def failure(self, unit: tuple[str, str], attempts: int, error: str) -> None:
        assert unit[0] not in self.results | self.failures, f"{unit[0]} was reported twice"
        self.failures[unit[0]] = (attempts, error)
        self.before_failure[unit[0]] = len(self.results)


def run_pool(folder: Path, units: Sequence[tuple[str, str]], **options: Any) -> Outcome:
    """Run the units; one replica, two retries and a minute per unit unless `options` differ."""
    settings = {"minimum": 1, "maximum": 1, "retries": 2, "shard_seconds": 60.0} | options
    pool = ReplicaPool(settings.pop("start", toy(folder)), **settings)
    outcome = Outcome()
    try:
        pool(units, outcome.result, outcome.failure)
    finally:
        pool.close()
    return outcome


def attempts(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}.*")))


pytestmark = [pytest.mark.clusters, pytest.mark.usefixtures("ray_cluster")]


def test_a_unit_that_raises_is_retried_then_reported(tmp_path: Path) -> None:
    # Far apart, with more others between than are in flight: two failures in a row cost the replica
    # and what it has in flight. The last two are in a row, when nothing else is left.
    units = [(f"u{i}", "fine") for i in range(20)]
    units = [("bad", "raises late"), *units[:10], ("shaky", "raises once"), *units[10:]]
    outcome = run_pool(tmp_path, units)
    assert outcome.failures == {"bad": (3, "ValueError: bad cannot be read")}
    assert attempts(tmp_path, "bad") == 3, "retries + 1 attempts, no more and no fewer"
    assert outcome.results["shaky"] == "shaky done", "a failure that passes was not retried"
    assert len(outcome.results) == 21, "other units did not go on"
    assert all(attempts(tmp_path, f"u{i}") == 1 for i in range(20)), "units of others ran again"


def test_a_unit_that_no_attempt_can_mend_is_given_up_and_the_others_go_on(tmp_path: Path) -> None:
    units = [("u0", "fine"), *((f"bad{i}", "hopeless") for i in range(4)), ("u1", "fine")]
    outcome = run_pool(tmp_path, units)
    expected = {f"bad{i}": (1, f"the loss of bad{i} is nan") for i in range(4)}
    assert outcome.failures == expected, "the same training is made again, or ends the job"
    assert sorted(outcome.results) == ["u0", "u1"]
    assert len(list(tmp_path.glob("worked-*"))) == 1, "the replica was replaced for no fault of its"


def test_a_unit_that_kills_its_replica_is_found_and_the_innocent_are_not(tmp_path: Path) -> None:
    units = [("u0", "slow"), ("killer", "kills"), *((f"u{i}", "slow") for i in range(1, 6))]
    # No retry at all: an innocent unit that is charged for the killer's deed would be given up.
    outcome = run_pool(tmp_path, units, retries=0)
    assert list(outcome.failures) == ["killer"], "an innocent unit was charged with a death"
    count, error = outcome.failures["killer"]
    assert count == 1
    assert "Died" in error, f"the record does not say that the replica died: {error}"
    assert sorted(outcome.results) == [f"u{i}" for i in range(6)]


def test_a_hung_unit_hits_its_time_limit(tmp_path: Path) -> None:
    units = [("u0", "fine"), ("hung", "hangs"), *((f"u{i}", "fine") for i in range(1, 5))]
    start = time.monotonic()
    outcome = run_pool(tmp_path, units, retries=0, shard_seconds=2.0)
    assert list(outcome.failures) == ["hung"], "the wrong unit was blamed for the hang"
    assert "replicas.shard_seconds" in outcome.failures["hung"][1]
    assert len(outcome.results) == 5
    assert time.monotonic() - start < 40, "the limit of 2 s was not kept"


def test_a_unit_of_several_shards_has_as_many_limits(tmp_path: Path) -> None:
    """A training on the whole pool takes hours: it is not taken for stuck and begun again."""
    units = [("long", "two seconds"), ("hung", "hangs")]
    worth = {"long": 6, "hung": 2}
    outcome = run_pool(
        tmp_path, units, retries=0, shard_seconds=1.0, shards=lambda unit: worth[unit[0]]
    )
    assert list(outcome.failures) == ["hung"], "all units have the limit of one shard"
    assert "not finished in 2 s" in outcome.failures["hung"][1]


def test_one_hung_unit_does_not_hide_behind_the_others(tmp_path: Path) -> None:
    # Other units of the replica finish all the time; the limit is the hung unit's own.
    units = [("hung", "hangs"), *((f"u{i}", "slow") for i in range(40))]
    outcome = run_pool(tmp_path, units, retries=0, shard_seconds=2.0)
    assert list(outcome.failures) == ["hung"]
    assert len(outcome.results) == 40
    assert outcome.before_failure["hung"] < 40, "noticed only when nothing else was left to do"


def test_a_model_that_does_not_load_stops_the_job(tmp_path: Path) -> None:
    units = [("m", "no model"), *((f"u{i}", "slow") for i in range(30))]
    with pytest.raises(ModelLoadError, match="cannot load the model of 'x'") as caught:
        run_pool(tmp_path, units)
    assert caught.value.exit_code == 2
    assert attempts(tmp_path, "m") == 1, "what no retry can mend was retried"


def test_replicas_that_never_come_up_end_the_job(tmp_path: Path) -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no driver on this node")

        def ready(self) -> None: ...

        def run(self, unit: Any) -> None: ...

    actor = ray.remote(max_restarts=0)(Broken)
    with pytest.raises(InputError, match="died before they were up"):
        run_pool(tmp_path, [("u", "fine")], start=lambda: actor.options(num_cpus=1).remote())  # type: ignore[attr-defined]


def test_every_unit_once_whatever_the_number_of_replicas(tmp_path: Path) -> None:
    units = [(f"u{i}", "meets" if i < 4 else "fine") for i in range(60)]
    outcome = run_pool(tmp_path, units, maximum=3)
    assert outcome.results == {f"u{i}": f"u{i} done" for i in range(60)}
    processes = len(list(tmp_path.glob("process-*")))
    assert processes > 1, "three replicas were allowed, one worked while units waited for it"
    assert all(attempts(tmp_path, f"u{i}") == 1 for i in range(60)), "a unit ran twice"


def test_replicas_killed_from_outside_cost_no_unit(tmp_path: Path) -> None:
    handles: list[Any] = []
    start = toy(tmp_path)

    def recorded() -> Any:
        handles.append(start())
        return handles[-1]

    deaths = 0

    class Killing(Outcome):
        def result(self, unit: tuple[str, str], value: str) -> None:
            nonlocal deaths
            super().result(unit, value)
            if len(self.results) in (4, 11):
                os.kill(ray.get(handles[-1].ready.remote()), 9)
                deaths += 1

    outcome = Killing()
    pool = ReplicaPool(recorded, minimum=1, maximum=1, retries=1, shard_seconds=60.0)
    units = [(f"u{i}", "slow") for i in range(16)]
    try:
        pool(units, outcome.result, outcome.failure)
    finally:
        pool.close()
    assert deaths == 2
    assert not outcome.failures, f"a unit was given up because its replica was killed: {outcome}"
    assert len(outcome.results) == 16


def test_one_broken_replica_burns_no_unit_s_retries(tmp_path: Path) -> None:
    class Sticky:
        """The first one that comes up fails every unit it is given."""

        def __init__(self) -> None:
            try:
                (tmp_path / "broken").touch(exist_ok=False)
                self.broken = True
            except FileExistsError:
                self.broken = False

        def ready(self) -> None: ...

        def run(self, unit: tuple[str, str]) -> str:
            time.sleep(0.05)
            if self.broken:
                (tmp_path / f"failed-{unit[0]}-{time.monotonic_ns()}").touch()
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return f"{unit[0]} done"

    actor: Any = ray.remote(max_restarts=0)(Sticky).options(num_cpus=1, max_concurrency=4)
    units = [(f"u{i}", "") for i in range(40)]
    started: list[Any] = []

    def start() -> Any:
        started.append(actor.remote())
        return started[-1]

    outcome = run_pool(tmp_path, units, minimum=3, maximum=3, retries=1, start=start)
    assert not outcome.failures, "a broken replica used up a unit's attempts"
    assert len(outcome.results) == 40
    burnt = len(list(tmp_path.glob("failed-*")))
    assert 2 <= burnt <= 4, f"{burnt} units met the broken replica: it was not replaced in time"
    assert len(started) == 4, "the broken replica was not replaced once"


def test_units_that_all_raise_do_not_replace_replicas_for_ever(tmp_path: Path) -> None:
    outcome = run_pool(tmp_path, [(f"u{i}", "raises") for i in range(12)], retries=1)
    assert len(outcome.failures) == 12
    assert all(count == 2 for count, _ in outcome.failures.values()), "attempts are miscounted"


def test_a_store_that_fails_a_unit_is_given_a_moment_while_others_go_on(tmp_path: Path) -> None:
    # Two hiccups one after the other: they say nothing of the replica.
    units = [("h0", "store once"), ("h1", "store once"), *((f"u{i}", "fine") for i in range(12))]
    outcome = run_pool(tmp_path, [*units, ("gone", "no store")], retries=1)
    assert list(outcome.failures) == ["gone"], "a hiccup of the store ended a unit"
    assert outcome.failures["gone"] == (
        2,
        "StorageError: bucket 'pool' at http://store cannot be reached",
    )
    assert len(outcome.results) == 14
    first, second = ((tmp_path / f"h0.{i}").stat().st_mtime for i in (1, 2))
    assert second - first >= 1.9, "the store was asked again at once"
    others = [(tmp_path / f"u{i}.1").stat().st_mtime for i in range(12)]
    assert max(others) < second, "the pause of one unit held up the others"
    assert len(list(tmp_path.glob("worked-*"))) == 1, "the replica was blamed for the store"


def test_idle_replicas_are_released_while_the_last_unit_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_IDLE_SECONDS", 0.2)
    up: list[int] = []

    def poll(ready: int, starting: int) -> None:
        up.append(ready)
        if max(up) == 2 and ready == 1:  # a machine slow to release it is no failure
            (tmp_path / "released").touch()

    units = [("last", "until released"), *((f"u{i}", "meets") for i in range(4))]
    outcome = run_pool(tmp_path, units, maximum=2, on_poll=poll)
    assert len(outcome.results) == 5
    assert max(up) == 2, "two replicas were never up together: test too weak"
    assert (tmp_path / "released").exists(), "an idle replica was held until the end of the phase"
    assert attempts(tmp_path, "last") == 1, "a replica was stopped at work"


def test_replicas_that_find_no_place_are_explained(tmp_path: Path) -> None:
    class Told(Exception):
        pass

    said: list[str] = []

    def note(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise Told

    class Huge:
        def ready(self) -> None: ...

    actor: Any = ray.remote(Huge).options(num_cpus=99)
    watch = PlacementWatch({"CPU": 99}, note, every=1.0)
    start = time.monotonic()
    with pytest.raises(Told):
        run_pool(tmp_path, [("u", "fine")], start=actor.remote, on_poll=watch.look)
    assert 1.5 < time.monotonic() - start < 20, "not one line per interval"
    assert "1 wanted with CPU 99 each" in said[0]
    assert "the cluster has CPU 4, of which free CPU" in said[0]


class Held(Silent):
    """Adds up the time that replicas had work, and counts what is tried again."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.again: list[str] = []

    def held(self, bundle: Any, seconds: float) -> None:
        self.seconds.append(seconds)

    def retried(self, bundle: Any) -> None:
        self.again.append(bundle[0])


def test_time_with_work_counts_once_and_time_without_any_never(tmp_path: Path) -> None:
    told, outcome = Held(), Outcome()
    pool = ReplicaPool(
        toy(tmp_path), minimum=1, maximum=1, retries=0, shard_seconds=60.0, observer=told
    )
    try:
        for phase in range(3):
            start = time.monotonic()
            pool([(f"p{phase}u{i}", "slow") for i in range(9)], outcome.result, outcome.failure)
            wall = time.monotonic() - start
            held = sum(told.seconds[9 * phase :])
            # Nine of 0.3 s, three at a time. The first phase waits for its replica as well.
            assert 0.8 < held < (wall + 0.01 if phase else 1.6), (
                f"phase {phase}: {held:.2f} s with work in {wall:.2f} s"
            )
            assert phase == 0 or held > 0.9 * wall, "time with work that no unit was charged for"
            time.sleep(1.5)
    finally:
        pool.close()
    assert len(told.seconds) == 27, "not one share of the time for each unit"


def test_attempts_that_are_made_again_are_told(tmp_path: Path) -> None:
    told = Held()
    units = [(f"u{i}", "fine") for i in range(8)]
    units = [("bad", "raises"), *units[:5], ("shaky", "raises once"), *units[5:]]
    run_pool(tmp_path, units, retries=1, observer=told)
    assert sorted(told.again) == ["bad", "shaky"], "the last attempt is no retry"
    assert len(told.seconds) == 12, "every attempt has its time, failed ones too"
    told, killed = Held(), tmp_path / "killed"
    killed.mkdir()
    units = [("first", "fine"), ("u0", "slow"), ("killer", "kills")]  # two at once
    outcome = run_pool(killed, units, retries=0, observer=told)
    assert list(outcome.failures) == ["killer"]
    assert "u0" in told.again, "a unit that went down with its replica was made again unseen"
