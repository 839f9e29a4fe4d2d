"""The pool of replicas: what it costs per shard, what a second replica brings, how far it goes.

    python -m benchmarks.pool --json FILE
    python -m benchmarks.pool overhead simulation

`overhead`: units that do nothing on 1, 4 and 16 actors of a real Ray, wall time and the driver's
CPU time per unit. `throughput`: gradient shards of a real model on two replicas of one thread each
and on one, and the same work in plain processes without Ray: what the machine itself allows.
`simulation`: the pool's own cost with up to 256 replicas and 10,000 shards, on a simulated cluster
(`pool_simulation.py`) whose replicas die, hang and raise.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where this is run as a module

# One thread a process, in whatever is started from here.
os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")

import ray
from common import embedded_ray, memory_mb, summary, write_json
from pool_simulation import Fate, Kind, SimulatedCluster

from influence.candidates import SourceFile
from influence.units import Bundle, bundled, range_units
from ray_jobs.pool import ReplicaPool
from ray_jobs.replica_actor import IN_FLIGHT

ROWS = 512
SECONDS = 10.0  # of a simulated shard


def bundles_of(count: int) -> list[Bundle]:
    """So many embedding shards of files that need not exist, a hundred each."""
    files = [
        SourceFile(f"s3://bucket/pool/part-{i:05d}.parquet", f"{i:032x}", 100 * ROWS, 1)
        for i in range(-(-count // 100))
    ]
    return bundled(range_units("embedding", "0" * 32, files, ROWS))[:count]


def run_all(pool: ReplicaPool, bundles: Sequence[Bundle]) -> None:
    """Run them; every one has to come back."""
    answers: list[Any] = []

    def failed(bundle: Bundle, attempts: int, error: str) -> None:
        raise RuntimeError(f"{bundle.units[0].key} failed after {attempts} attempts: {error}")

    pool(bundles, lambda bundle, answer: answers.append(bundle), failed)
    assert len(answers) == len(bundles), "units were lost"


# --- overhead ---


class Nothing:
    """A replica whose units take no time; its answers are as large as real ones."""

    def ready(self) -> int:
        """Once it is up."""
        return os.getpid()

    def run(self, bundle: Bundle) -> list[tuple[Any, ...]]:
        """What a worker says of each unit."""
        return [
            (unit.key, "created", ROWS, 100 * ROWS, 0.0, SECONDS, "cpu", ())
            for unit in bundle.units
        ]


def overhead(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds per unit, wall and the driver's CPU, by replicas and units."""
    actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(Nothing)
    options = actor.options(num_cpus=1, max_concurrency=IN_FLIGHT + 1)
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with embedded_ray(sum(arguments.replicas)):
        pools = {}
        for replicas in arguments.replicas:
            pools[replicas] = ReplicaPool(
                options.remote, minimum=replicas, maximum=replicas, retries=0, shard_seconds=600.0
            )
            run_all(pools[replicas], bundles_of(50 * replicas))
        for _ in range(arguments.rounds):
            for shards in arguments.shards:
                bundles = bundles_of(shards)
                for replicas, pool in pools.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    run_all(pool, bundles)
                    took = time.perf_counter() - wall, time.process_time() - cpu
                    each = 1e3 / shards
                    found.setdefault((replicas, shards), []).append(
                        (took[0] * each, took[1] * each)
                    )
        for pool in pools.values():
            pool.close()
    return [
        {
            "replicas": replicas,
            "shards": shards,
            "wall_ms": summary([wall for wall, _ in times]),
            "driver_cpu_ms": summary([cpu for _, cpu in times]),
        }
        for (replicas, shards), times in found.items()
    ]


# --- simulation ---


def fate(unit: Bundle, attempt: int, random: Any) -> Fate:
    """About ten seconds; now and then a replica dies of a unit, hangs, or the unit raises."""
    del unit
    seconds = SECONDS * random.uniform(0.5, 1.5)
    if attempt > 2:
        return Fate("fine", seconds)
    chance = random.random()
    kinds: tuple[tuple[float, Kind], ...]
    kinds = ((0.001, "hangs"), (0.003, "kills"), (0.01, "raises"), (0.02, "store"))
    for below, kind in kinds:
        if chance < below:
            return Fate(kind, seconds)
    return Fate("fine", seconds)


def simulate(replicas: int, shards: int, troubled: bool) -> dict[str, Any]:
    """One case, in a process of its own: the memory of a first run, the time of the fastest."""
    before = memory_mb("VmRSS")
    bundles = bundles_of(shards)
    cluster, cpu = simulated_run(replicas, bundles, troubled)
    peak = memory_mb("VmHWM") - before
    cpu = min(cpu, *(simulated_run(replicas, bundles, troubled)[1] for _ in range(4)))
    return {
        "replicas": replicas,
        "shards": shards,
        "troubled": troubled,
        "cpu_ms_per_shard": 1e3 * cpu / shards,
        "waits_per_shard": cluster.calls["arrived"] / shards,
        "peak_mb": peak,
        "attempts_per_shard": sum(cluster.attempts.values()) / shards,
        "deaths": cluster.deaths,
        "simulated_seconds": cluster.now(),
        "at_work": cluster.worked / (min(replicas, shards) * cluster.now()),
    }


def simulated_run(
    replicas: int, bundles: Sequence[Bundle], troubled: bool
) -> tuple[SimulatedCluster, float]:
    """The cluster after a run, and the CPU seconds of pool and simulation together."""
    cluster = SimulatedCluster(
        fate if troubled else lambda unit, attempt, random: Fate("fine", SECONDS),
        lifetime=2000.0 if troubled else None,
    )
    pool = ReplicaPool(
        cluster.start, minimum=1, maximum=replicas, retries=5, shard_seconds=60.0, calls=cluster
    )
    gc.freeze()  # what was there before is not looked through for garbage
    start = time.process_time()
    run_all(pool, bundles)
    cpu = time.process_time() - start
    pool.close()
    return cluster, cpu


def simulation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case."""
    found = []
    context = multiprocessing.get_context("spawn")
    for troubled in (False, True):
        for shards in arguments.simulated_shards:
            for replicas in arguments.simulated_replicas:
                with ProcessPoolExecutor(1, context) as alone:
                    found.append(alone.submit(simulate, replicas, shards, troubled).result())
    return found


# --- output ---


def show(found: dict[str, Any]) -> None:
    """Tables on stdout."""
    for case in found.get("overhead", []):
        wall, cpu = case["wall_ms"], case["driver_cpu_ms"]
        print(
            f"overhead, {case['replicas']:>3} replicas, {case['shards']:>6,} shards: "
            f"{wall['median']:.3f} ms ({wall['least']:.3f}-{wall['most']:.3f}) a shard, "
            f"driver's CPU {cpu['median']:.3f} ms ({cpu['least']:.3f}-{cpu['most']:.3f})"
        )
    if "throughput" in found:
        for way, case in found["throughput"]["ways"].items():
            for count, rate in case["tokens_per_second"].items():
                print(f"throughput, {way}, {count}: {rate['median']:.1f} tokens/s")
            gain = case["gain"]
            print(f"  gain {gain['median']:.3f} ({gain['least']:.3f}-{gain['most']:.3f})")
    for case in found.get("simulation", []):
        print(
            f"simulation{', troubled' if case['troubled'] else '':>10}, "
            f"{case['replicas']:>3} replicas, {case['shards']:>6,} shards: "
            f"{case['cpu_ms_per_shard']:.3f} ms CPU and {case['waits_per_shard']:.2f} waits "
            f"a shard, {case['peak_mb']:.1f} MB, {case['deaths']} deaths, "
            f"{case['attempts_per_shard']:.3f} attempts a shard, "
            f"replicas at work {case['at_work']:.1%}"
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    add("--rounds", type=int, default=5, help="of overhead; throughput makes three")
    add("--replicas", type=int, nargs="+", default=[1, 4, 16])
    add("--shards", type=int, nargs="+", default=[3_000, 10_000])
    add("--simulated-replicas", type=int, nargs="+", default=[16, 64, 256])
    add("--simulated-shards", type=int, nargs="+", default=[1_000, 10_000])
    add("--data", default="runs/demo-data/pool.parquet", help="rows for the throughput")
    add("--units", type=int, default=40, help="gradient shards of a round of throughput")
    add("--rows", type=int, default=4, help="rows of one of them")
    ways = ["pool", "plain processes"]
    add("--ways", nargs="+", choices=ways, default=ways, help="of throughput; default: both")
    add("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two replicas of one thread against one; see `pool_throughput`."""
    from pool_throughput import measure

    return measure(arguments)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "overhead": overhead,
    "throughput": throughput,
    "simulation": simulation,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    arguments = parse(argv)
    found = {part: PARTS[part](arguments) for part in arguments.parts or PARTS}
    show(found)
    if arguments.json:
        write_json(arguments.json, {"load": os.getloadavg(), **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
