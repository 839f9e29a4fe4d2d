"""What tests of faults share: how often each shard was computed, and a record of every fault."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray

from influence.config import Config
from influence.worker import Worker

#: One JSON line for each fault goes to the file of this name; see docs/faults.md.
OUT = "INFLUENCE_FAULTS_OUT"


@dataclass
class Fault:
    """A row of the table: runs that the fault was part of, what was killed, how it ended."""

    fault: str
    runs: int = 1
    kills: int = 0
    recomputed: int = 0
    outcome: str = ""
    seconds: float = 0.0


@contextmanager
def recorded(fault: str, *, runs: int = 1) -> Iterator[Fault]:
    """Times the block, which fills in the rest; a block that raises leaves a failed row."""
    row, start = Fault(fault, runs), time.monotonic()
    try:
        yield row
    except BaseException:
        row.outcome = "FAILED"
        raise
    finally:
        row.seconds = round(time.monotonic() - start, 1)
        record(row)


def record(row: Fault) -> None:
    """Add a row to the file that the environment names, if it does."""
    if path := os.environ.get(OUT):
        with open(path, "a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def counting_factory(
    log: Path, before: Callable[[str], None] = lambda key: None
) -> Callable[[Config], Callable[[], Any]]:
    """In place of `replica_factory`: replicas that write down what they begin and what they commit.

    Args:
        log: a line is appended to this file for every bundle that begins and every unit that ends.
        before: called with the key of a bundle's first unit once it has begun; travels by value,
            so it has to be a local function.
    """

    class CountedReplica:  # local, so that it travels by value
        def __init__(self, document: dict[str, Any]) -> None:
            self.worker = Worker(Config.model_validate(document))
            self.where = f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"

        def ready(self) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), os.getpid()

        def run(self, bundle: Any) -> Any:
            self._write("begin", bundle.units[0].key)
            before(bundle.units[0].key)
            results = self.worker.run(bundle)
            for result in results:
                # One that was there when it began has no rows; else it was computed for nothing.
                again = result.outcome == "exists" and result.rows > 0
                self._write("again" if again else result.outcome, result.key)
            return results

        def _write(self, what: str, key: str) -> None:
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                os.write(file, f"{what} {key} {self.where}\n".encode())
            finally:
                os.close(file)

    def factory(config: Config) -> Callable[[], Any]:
        settings = config.replicas
        actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(CountedReplica).options(
            num_cpus=settings.num_cpus, max_concurrency=4
        )
        document = config.model_dump(mode="json")
        return lambda: actor.remote(document)

    return factory


class Line(NamedTuple):
    """What a replica (a node and a process on it) wrote down about a shard."""

    what: str  # begin, or an outcome: created, replaced, exists, again
    key: str
    node: str
    pid: int


def lines_of(log: Path) -> list[Line]:
    """Everything that the replicas wrote down, in order."""
    if not log.exists():
        return []
    split = (line.split() for line in log.read_text().splitlines())
    return [Line(what, key, node, int(pid)) for what, key, node, pid in split]


def recomputed(log: Path) -> int:
    """How often a shard was computed that was committed before its computation began."""
    committed: set[str] = set()
    late: set[tuple[str, int]] = set()
    count = 0
    for line in lines_of(log):
        if line.what == "begin":
            if line.key in committed:
                late.add((line.key, line.pid))
        elif line.what == "again":
            count += (line.key, line.pid) in late
        elif line.what == "replaced":
            count += 1
        else:
            committed.add(line.key)
    assert committed, "no shard was counted: the replicas are not the counting ones"
    return count


def replicas_of(log: Path) -> list[psutil.Process]:
    """The processes of the replicas that have begun something and are alive."""
    found = []
    for pid in {line.pid for line in lines_of(log)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if "CountedReplica" in " ".join(process.cmdline()):  # a zombie has none
                found.append(process)
    return found


def held(gate: Path) -> Callable[[str], None]:
    """For `counting_factory`: shards wait whose key the gate's text, a pattern, is found in."""

    def wait(key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            while re.search(gate.read_text(), key):
                time.sleep(0.02)

    return wait


def wait_until(what: str, done: Callable[[], Any], seconds: float = 240.0) -> None:
    """Until `done()` is true."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
