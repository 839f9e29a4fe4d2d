"""Nodes that go and come in mid-run: without a word, and after a notice."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from faults import counting_factory, held, lines_of, recomputed, recorded, wait_until
from ray_nodes import LocalNode, alive, further_nodes
from tiny_run import Setup, assert_same_results, manifest_of, tiny_config

from influence import one_process
from influence.config import Config
from ray_jobs import pool as pool_module
from ray_jobs import replicas as replicas_module
from ray_jobs import select as select_job
from ray_jobs.pool import ReplicaPool

pytestmark = pytest.mark.clusters


@pytest.fixture(scope="module")
def nodes(ray_cluster: None) -> Iterator[list[LocalNode]]:
    """Nodes of one CPU each beside the head, whose CPUs are taken."""
    with further_nodes() as started:
        started += [LocalNode(1) for _ in range(3)]
        yield started


@pytest.fixture(scope="module")
def undisturbed(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run that every other one must equal."""
    config = tiny_config(setup, tmp_path_factory.mktemp("plain") / "run", **CHANGES)
    one_process.run_select(config, quiet=True)
    return config.run


#: No retry at all: a unit that is charged with the loss of a node would be given up.
CHANGES: dict[str, Any] = {"method": "rds", "replicas__rows_per_shard": 2, "replicas__retries": 0}


class Job:
    """A run in a thread of its own, on counting replicas; units wait until they are released."""

    def __init__(self, setup: Setup, folder: Path, patch: pytest.MonkeyPatch, **changes: Any):
        self.config: Config = tiny_config(setup, folder / "run", **CHANGES, **changes)
        self.log, self.gate = folder / "log", folder / "gate"
        self.error: BaseException | None = None
        self.hold()
        patch.setattr(select_job, "replica_factory", counting_factory(self.log, held(self.gate)))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            select_job.run_select(self.config, quiet=True)
        except BaseException as error:
            self.error = error

    def hold(self, pattern: str = "") -> None:
        """From now on every unit waits, once it has begun, whose key matches the pattern."""
        hidden = self.gate.with_suffix(".new")
        hidden.write_text(pattern)
        hidden.rename(self.gate)

    def release(self) -> None:
        self.gate.unlink()

    def on(self, node: LocalNode, *what: str) -> list[str]:
        """Keys of what a node has begun (or ended, with outcomes)."""
        kinds = what or ("begin",)
        return [x.key for x in lines_of(self.log) if x.node == node.id and x.what in kinds]

    def until(self, what: str, done: Callable[[], Any]) -> None:
        def over() -> Any:
            assert self._thread.is_alive() or done(), f"the job ended early: {self.error!r}"
            return done()

        wait_until(what, over)

    def end(self, undisturbed: str, why: str) -> None:
        """Let it end, and compare."""
        self._thread.join(timeout=240)
        assert not self._thread.is_alive(), f"the job hangs: {why}"
        if self.error is not None:
            raise AssertionError(f"the job failed: {self.error}") from self.error
        for name, stage in manifest_of(self.config.run).stages.items():
            assert not stage.failed, f"{name}: a unit was charged with the loss of its node"
            assert stage.computed + stage.reused == stage.shards, f"{name}: a shard counts twice"
        assert_same_results(undisturbed, self.config.run, why)


def test_a_raylet_killed_and_a_node_that_joins(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[LocalNode],
    undisturbed: str,
) -> None:
    # One unit on each replica: whoever charges it with the death of its replica gives it up.
    monkeypatch.setattr(replicas_module, "IN_FLIGHT", 1)
    with recorded("raylet killed, 3 nodes; one joins") as fault:
        job = Job(setup, tmp_path, monkeypatch, replicas__min=3, replicas__max=3)
        job.until("each node has a unit", lambda: all(_open(job, node) for node in nodes))
        lost, joins = nodes[0], LocalNode(1)
        lost.kill()
        nodes[:] = [*nodes[1:], joins]
        fault.kills = 1
        job.until("the node that joined works", lambda: job.on(joins))
        job.release()
        job.end(undisturbed, "a lost node changed the result")
        fault.recomputed = recomputed(job.log)
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        fault.outcome = "the same bytes, no retry charged"


def _open(job: Job, node: LocalNode) -> list[str]:
    """What a node has begun and not ended."""
    ended = job.on(node, "created", "exists", "again", "replaced")
    return [key for key in job.on(node) if key not in ended]


def test_a_node_that_drains(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[LocalNode],
    undisturbed: str,
) -> None:
    # Several units on each replica from the first one on, however long they are held here.
    monkeypatch.setattr(replicas_module, "QUICK_SECONDS", float("inf"))
    with recorded("spot notice (ray drain-node), then the node goes") as fault:
        job = Job(setup, tmp_path, monkeypatch, replicas__min=2, replicas__max=2)
        job.until("two have units", lambda: sorted(len(_open(job, n)) for n in nodes) == [0, 3, 3])
        first, second, spare = sorted(nodes, key=lambda node: not job.on(node))
        under_way = _open(job, first)
        first.drain(60)
        job.until("the spare node works instead", lambda: len(_open(job, spare)) == 3)
        job.hold(f"^(?!{'|'.join(map(re.escape, under_way))})")
        job.until("the drained node is given back", lambda: first.id not in alive())
        assert job.on(first) == under_way, "a node was given work after its notice"
        assert sorted(under_way) == sorted(job.on(first, "created")), "work under way was cut off"
        # The next one goes before its work is done.
        joins = LocalNode(1)
        nodes[:] = [spare, joins, second]
        second.drain(1)
        job.until("the new node works instead", lambda: job.on(joins))
        second.kill()
        nodes.remove(second)
        fault.kills = 1
        job.release()
        job.end(undisturbed, "a drained node changed the result")
        fault.recomputed = recomputed(job.log)
        assert fault.recomputed == 0, "a shard was computed after it had been committed"
        fault.outcome = "the same bytes, work under way finished, none begun there"


def run_toys(start: Callable[[], Any], units: list[str], replicas: int) -> tuple[set, dict]:
    """Run the units with no retry; (done, {failed: error})."""
    done: set[str] = set()
    failed: dict[str, str] = {}
    pool = ReplicaPool(start, minimum=replicas, maximum=replicas, retries=0, shard_seconds=100.0)
    try:
        pool(
            units,
            lambda unit, value: done.add(unit),
            lambda unit, attempts, error: failed.update({unit: error}),
        )
    finally:
        pool.close()
    return done, failed


def test_a_unit_that_takes_node_after_node_down_is_named_in_the_end(
    monkeypatch: pytest.MonkeyPatch, nodes: list[LocalNode]
) -> None:
    class Toy:  # local, so that it travels by value
        def ready(self) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), os.getpid()

        def run(self, unit: str) -> None:
            if unit == "killer":
                raylet = psutil.Process().parent()
                assert raylet is not None
                assert raylet.name() == "raylet"
                time.sleep(1.0)  # the units beside it are answered by then
                raylet.kill()
                time.sleep(60)

    monkeypatch.setattr(pool_module, "_NODES_LOST", 1)
    monkeypatch.setattr(replicas_module, "IN_FLIGHT", 1)
    nodes.append(LocalNode(1))
    before = len(nodes)
    actor: Any = ray.remote(max_restarts=0)(Toy).options(num_cpus=1, max_concurrency=4)
    done, failed = run_toys(actor.remote, ["u0", "killer", "u1", "u2"], 1)
    nodes[:] = [node for node in nodes if node.up]
    assert list(failed) == ["killer"], "the loss of a node was charged to an innocent unit"
    assert done == {"u0", "u1", "u2"}
    assert before - len(nodes) == 2, "a loss is forgiven once here, no more and no fewer times"


def test_replicas_that_start_on_a_node_that_goes_do_not_end_the_job(
    tmp_path: Path, nodes: list[LocalNode]
) -> None:
    starting = pool_module._START_FAILURES
    many, others = LocalNode(starting), len(nodes)
    nodes.append(many)
    lost, replaced = many.id, tmp_path / "all replaced"

    class Toy:
        def __init__(self) -> None:
            if ray.get_runtime_context().get_node_id() == lost:
                (tmp_path / f"starts-{os.getpid()}").touch()
                time.sleep(100)

        def ready(self) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), os.getpid()

        def run(self, unit: str) -> None:
            while not replaced.exists():
                time.sleep(0.05)

    actor: Any = ray.remote(max_restarts=0)(Toy).options(num_cpus=1, max_concurrency=4)
    started: list[Any] = []

    def start() -> Any:
        started.append(actor.remote())
        if len(started) == others + 2 * starting:
            replaced.touch()
        return started[-1]

    def kill() -> None:
        wait_until("all start", lambda: len(list(tmp_path.glob("starts-*"))) == starting)
        many.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done, failed = run_toys(start, [f"u{i}" for i in range(20)], others + starting)
    assert not failed
    assert len(done) == 20
