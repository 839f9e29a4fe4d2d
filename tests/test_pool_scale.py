"""The pool itself on a simulated cluster: large, elastic, and with every kind of trouble."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from pool_simulation import Fate, SimulatedCluster

from influence.errors import InputError
from ray_jobs.attempts import Attempt, Queue
from ray_jobs.pool import ReplicaPool

LIMIT = 60.0


class Run:
    """What a pool made of some units."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.reported: Counter[Any] = Counter()
        self.failures: dict[Any, tuple[int, str]] = {}
        self.polls: list[tuple[float, int, int]] = []

    def __call__(self, units: Sequence[Any], **options: Any) -> Run:
        """Run the units on 1 to 8 replicas with two retries, unless `options` differ."""
        settings = {"minimum": 1, "maximum": 8, "retries": 2, "shard_seconds": LIMIT} | options
        cluster = self.cluster
        pool = ReplicaPool(cluster.start, calls=cluster, on_poll=self._poll, **settings)
        try:
            pool(units, self._result, self._failure)
        finally:
            pool.close()
        assert not cluster.alive, "replicas outlive the pool"
        return self

    def _result(self, unit: Any, value: Any) -> None:
        assert value == unit, "a unit was given another one's answer"
        self.reported[unit] += 1

    def _failure(self, unit: Any, attempts: int, error: str) -> None:
        self.reported[unit] += 1
        self.failures[unit] = (attempts, error)

    def _poll(self, up: int, awaited: int) -> None:
        self.polls.append((self.cluster.now(), up, awaited))


def fine(unit: Any, attempt: int, generator: random.Random) -> Fate:
    """Ten seconds."""
    del unit, attempt, generator
    return Fate("fine", 10.0)


def troubled(unit: int, attempt: int, generator: random.Random) -> Fate:
    """Every hundredth unit is poison of one kind or another; of others, one attempt in fifty."""
    if unit % 100 == 99:
        return Fate(("raises", "kills", "hangs")[unit // 100 % 3], 10.0)
    seconds = generator.uniform(5.0, 15.0)
    if attempt < 3 and generator.random() < 0.02:
        return Fate(generator.choice(("raises", "store", "kills", "hangs")), seconds)
    return Fate("fine", seconds)


def test_ten_thousand_shards_on_replicas_that_die_are_reported_once_each() -> None:
    cluster = SimulatedCluster(troubled, lifetime=1000.0)
    run = Run(cluster)(range(10_000), maximum=256, retries=4)
    assert cluster.most == 256, "not all replicas were used: test too weak"
    assert cluster.deaths > 300, "hardly a replica died: test too weak"
    assert run.reported == Counter(range(10_000)), "a unit was lost, or reported twice"
    poison = [unit for unit in range(10_000) if unit % 100 == 99]
    assert sorted(run.failures) == poison, "an innocent was given up, or poison was not found"
    assert {count for count, _ in run.failures.values()} == {5}, "retries + 1 attempts"
    said = {unit // 100 % 3: error for unit, (_, error) in run.failures.items()}
    assert said[0] == "ValueError: cannot be read"
    assert "Died" in said[1]
    assert "replicas.shard_seconds" in said[2]
    # At most twice in flight with a poisoned one, and its own troubles: no unit is made for ever.
    assert max(cluster.attempts[unit] for unit in range(10_000) if unit % 100 != 99) <= 8


def steps(shards: int, replicas: int) -> float:
    """Instructions of Python that the pool's own modules execute per shard."""
    executed = 0
    files = {f"{name}.py" for name in ("pool", "attempts", "replicas")}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal executed
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.parent.name != "ray_jobs" or path.name not in files:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            executed += 1
        return trace

    run = Run(SimulatedCluster(troubled, lifetime=2000.0))
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(range(shards), maximum=replicas, retries=4)
    finally:
        sys.settrace(before)
    assert len(run.reported) == shards
    return executed / shards


def test_work_per_shard_grows_neither_with_the_shards_nor_with_the_replicas() -> None:
    few, many = steps(1_000, 16), steps(10_000, 16)
    assert many < 1.1 * few, f"{few:.0f} instructions a shard of 1,000, {many:.0f} of 10,000"
    wide = steps(10_000, 256)
    assert wide < 1.6 * many, f"{many:.0f} instructions with 16 replicas, {wide:.0f} with 256"


def test_replicas_follow_the_work_between_their_bounds() -> None:
    for units, minimum, expected in ((3, 1, 3), (1, 2, 2), (100, 1, 8)):
        run = Run(SimulatedCluster(fine))(range(units), minimum=minimum)
        assert run.cluster.most == expected, f"{units} units on at least {minimum} replicas"
        assert len(run.reported) == units


def test_no_long_shard_waits_behind_another_while_a_replica_has_nothing_to_do() -> None:
    """Graham's bound of list scheduling holds only where each shard goes to who is free first."""
    for units in (2, 9, 41):
        seconds = [random.Random(unit).uniform(60.0, 600.0) for unit in range(units)]
        fates = [Fate("fine", took) for took in seconds]
        cluster = SimulatedCluster(lambda unit, *_, fates=fates: fates[unit], places=1)
        cluster.at(3.0, lambda cluster=cluster: cluster.resize(4))  # one comes up before the others
        Run(cluster)(range(units), maximum=4, shard_seconds=2000.0)
        bound = sum(seconds) / 4 + max(seconds) * 3 / 4
        assert cluster.now() <= bound + 15, (
            f"{units} shards of minutes took {cluster.now():.0f} s on four replicas; at most "
            f"{bound:.0f} s and their starts, unless shards queue up behind long ones"
        )


def test_nodes_that_join_are_used_and_unmet_demand_is_withdrawn_at_the_tail() -> None:
    cluster = SimulatedCluster(fine, places=2)
    cluster.at(100.0, lambda: cluster.resize(6))
    run = Run(cluster)(range(200))
    early = {(up, awaited) for time, up, awaited in run.polls if 10 < time < 100}
    assert early == {(2, 6)}, "demand is not kept up while there is work for it"
    late = {(up, awaited) for time, up, awaited in run.polls if 110 < time < 300}
    assert late == {(6, 2)}, "replicas on nodes that joined are not used"
    # 18 units by the second node's end, two by two; the others six by six.
    assert cluster.now() < 100 + 5 + 182 / 6 * 10 + 15, "new replicas were given no work"
    tail = [poll for poll in run.polls if poll[0] > cluster.now() - 9]
    assert tail, "no word in the last seconds: test too weak"
    assert all(awaited == 0 for _, _, awaited in tail), "unmet demand holds nodes at the tail"
    assert cluster.calls["kill"] == 8
    assert set(cluster.attempts.values()) == {1}


def test_nodes_that_leave_cost_no_unit_its_retries() -> None:
    cluster = SimulatedCluster(fine)
    for second, places in ((57, 2), (113, 8), (171, 1), (233, 8)):
        cluster.at(second, lambda places=places: cluster.resize(places))
    run = Run(cluster)(range(300), retries=1)
    assert cluster.deaths == 13, "the nodes took no replicas along: test too weak"
    assert run.reported == Counter(range(300))
    assert not run.failures
    assert max(cluster.attempts.values()) <= 3
    recovered = [up for time, up, _ in run.polls if 240 < time < 300]
    assert set(recovered) == {8}, "lost replicas were not replaced"


def test_a_node_that_goes_while_its_replicas_start_is_one_failure_and_not_many() -> None:
    cluster = SimulatedCluster(fine, start_seconds=5.0)
    for second in (2.0, 4.0):
        cluster.at(second, lambda: cluster.resize(0))
        cluster.at(second, lambda: cluster.resize(8))
    run = Run(cluster)(range(50))
    assert cluster.deaths == 16, "no replicas died while they started: test too weak"
    assert run.reported == Counter(range(50)), "a lost node ended the job"


def test_replicas_that_never_come_up_end_the_job_only_if_no_other_is_at_work() -> None:
    def lose_all_that_start(cluster: SimulatedCluster, keep: int) -> None:
        for second in range(10, 200):
            cluster.at(second, lambda: cluster.resize(keep))
            cluster.at(second, lambda: cluster.resize(8))

    alone = SimulatedCluster(fine, start_seconds=30.0)
    lose_all_that_start(alone, 0)
    with pytest.raises(InputError, match="5 times in a row replicas died before they were up"):
        Run(alone)(range(50))
    cluster = SimulatedCluster(fine, places=1, start_seconds=5.0)
    lose_all_that_start(cluster, 1)
    run = Run(cluster)(range(30))
    assert run.reported == Counter(range(30)), "failing starts ended a job that was getting on"
    assert cluster.calls["ready"] < 8 + 7 * 15, "replacements are started without a pause"


def test_replicas_are_given_back_while_the_reducer_takes_long() -> None:
    cluster = SimulatedCluster(fine)
    polls: list[tuple[int, int]] = []
    pool = ReplicaPool(
        cluster.start,
        minimum=2,
        maximum=8,
        retries=0,
        shard_seconds=LIMIT,
        on_poll=lambda up, awaited: polls.append((up, awaited)),
        calls=cluster,
    )
    done: list[Any] = []

    def ignore(*told: Any) -> None: ...

    def work() -> None:
        pool(range(len(done), len(done) + 80), lambda unit, value: done.append(unit), ignore)

    def wait(seconds: float) -> None:
        until = cluster.now() + seconds
        while cluster.now() < until:
            cluster.arrived(1.0)
            pool.rest()

    pool.rest()  # before the first phase
    work()
    wait(30.0)
    assert len(cluster.alive) == 8, "replicas were given back before a next round could need them"
    wait(60.0)
    assert len(cluster.alive) == 2, "replicas are held for nothing while the reducer works"
    assert polls[-1] == (2, 0), "nobody is told that they went"
    work()
    assert cluster.most == 8
    assert sorted(done) == list(range(160))
    assert cluster.calls["ready"] == 8 + 6, "those that were given back were not demanded again"
    pool.close()


def test_a_stop_signal_ends_the_handing_out_and_every_replica() -> None:
    cluster = SimulatedCluster(fine, places=4)

    def stop() -> None:
        raise KeyboardInterrupt

    cluster.at(50.0, stop)
    run = Run(cluster)
    with pytest.raises(KeyboardInterrupt):
        run(range(100))
    assert not cluster.alive, "replicas, or demand for them, outlive a job that was stopped"
    # Four at a time since the fifth second, and three in flight with each.
    assert cluster.calls["run"] == len(run.reported) + 4 * 3, "units were handed out after the stop"


def test_a_hung_unit_costs_no_more_time_limits_than_it_has_attempts() -> None:
    def fate(unit: int, attempt: int, generator: random.Random) -> Fate:
        return Fate("hangs") if unit == 4 else fine(unit, attempt, generator)

    for retries, limits in ((2, 3), (1, 2)):
        cluster = SimulatedCluster(fate)
        run = Run(cluster)(range(9), maximum=1, retries=retries)
        assert list(run.failures) == [4], "a unit that waited behind the hung one was blamed"
        assert run.failures[4][0] == cluster.attempts[4] == retries + 1
        spent = cluster.now() - 8 * 10.0 - (limits + 1) * 5.0
        assert spent < limits * (LIMIT + 3.0), f"{spent:.0f} s for {limits} attempts"


def test_waiting_behind_others_does_not_count_against_the_time_limit() -> None:
    run = Run(SimulatedCluster(lambda *of: Fate("fine", 0.7 * LIMIT)))(range(20), maximum=2)
    assert not run.failures
    assert set(run.cluster.attempts.values()) == {1}, "a unit that only waited was called late"


def test_without_a_retry_nobody_is_given_up_for_a_time_limit_that_others_shared() -> None:
    def fate(unit: int, attempt: int, generator: random.Random) -> Fate:
        return Fate("hangs") if unit == 2 else fine(unit, attempt, generator)

    # The replica passes over the first of its queue: it is not the one that hangs.
    cluster = SimulatedCluster(fate, newest_first=True)
    run = Run(cluster)(range(9), maximum=1, retries=0)
    assert list(run.failures) == [2], "the first of the queue was given up, and it only waited"


def test_a_replica_looks_at_few_units_however_many_it_may_not_have() -> None:
    queue, seen = Queue(range(10_000)), 0

    def never(attempt: Attempt) -> bool:
        nonlocal seen
        seen += 1
        return False

    assert queue.take(never) is None
    assert 0 < seen <= 100, "every unit that waits is looked at for every answer"
    assert len(queue) == 10_000
