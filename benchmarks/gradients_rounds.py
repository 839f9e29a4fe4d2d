"""Worker processes of gradients.py, the sweep of their batch sizes, and the interleaved rounds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gradients_protocol import grouped

HERE = Path(__file__).parent
ONE_ROW = 1
STDERR_TAIL = 12


class WorkerError(Exception):
    """A worker ended before it answered, or could not hold a batch."""


@dataclass(frozen=True)
class Command:
    """How a row's worker is started: `python script NAME JOB FD`."""

    python: str
    script: str


class Worker:
    """One live process that loads the model once and computes only when asked."""

    def __init__(self, name: str, command: Command, job: Path, threads: int):
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115 - closed by `close`
            "w+", encoding="utf-8", errors="replace"
        )
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if command.python != sys.executable:
            # A peer's environment has its own packages.
            environment.pop("PYTHONPATH", None)
        # Not stdout: some libraries print there when they are imported.
        answers, given = os.pipe()
        self._name = name
        self._process = subprocess.Popen(
            [command.python, str(HERE / command.script), name, str(job), str(given)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            env=environment,
            pass_fds=(given,),
            text=True,
        )
        os.close(given)
        self._answers = os.fdopen(answers, encoding="utf-8")
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, rows: Sequence[int] | None, budget: int) -> dict[str, Any]:
        """Seconds, tokens and memory of one pass over the rows (None: all of them)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"rows": rows, "budget": budget}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: the answer says with which words
        return self._answer()

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, by its own choice if it still listens."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, with a command unread
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        tail = "\n".join(self._errors.read().splitlines()[-STDERR_TAIL:])
        raise WorkerError(f"{self._name}: its worker ended with exit code {code}:\n{tail}")


Call = Callable[[str], dict[str, Any]]


def distinct_budgets(lengths: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """The budgets that give different batches, the smallest of equals."""
    seen: dict[str, int] = {}
    for budget in sorted(budgets):
        seen.setdefault(str(grouped(lengths, budget)), budget)
    return list(seen.values())


def sweep(
    worker: Worker, rows: Sequence[int], lengths: Sequence[int], budgets: Sequence[int]
) -> dict[int, float]:
    """Tokens/s by tokens per batch on some rows (1: a row a batch); what does not fit is left out.

    The first budget is run once more before, to warm up. Budgets grow: where the worker dies of
    one (the system may kill it for want of memory) the smaller ones count. Raises WorkerError if
    none fits.
    """
    wanted = distinct_budgets([lengths[i] for i in rows], budgets)
    worker.run(rows, wanted[0])
    found = {}
    for budget in wanted:
        try:
            answer = worker.run(rows, budget)
        except WorkerError:
            if not found:
                raise
            break
        if "out_of_memory" not in answer:
            found[budget] = answer["tokens"] / answer["seconds"]
    if not found:
        raise WorkerError(f"out of memory at every batch size in {wanted}")
    return found


def best_budget(speeds: dict[int, float]) -> int:
    """The fastest; the smaller of equals."""
    return min(speeds, key=lambda budget: (-speeds[budget], budget))


def round_orders(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """For every round an order of its own that has each name once."""
    generator = np.random.default_rng([seed, 0x0DE5])
    return [[names[int(i)] for i in generator.permutation(len(names))] for _ in range(rounds)]


def run_rounds(
    orders: Sequence[Sequence[str]], call: Call
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """(answers by name, one a round in the order of the rounds; what failed, with the reason).

    A name that fails is asked no more, and none of its answers counts.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for order in orders:
        for name in order:
            if name in failed:
                continue
            try:
                found.setdefault(name, []).append(call(name))
            except WorkerError as error:
                failed[name] = str(error)
                del found[name]
    return found, failed


class Session:
    """The workers of a run: all alive at once, or each one started for every call.

    A worker that is kept holds its copy of the model while the others compute; one that is not is
    warmed up on the sweep's rows before it is timed.
    """

    def __init__(self, commands: dict[str, Command], job: Path, threads: int, *, keep: bool):
        self._commands, self._job, self._threads, self._keep = commands, job, threads, keep
        self._live: dict[str, Worker] = {}

    def choose(
        self, name: str, rows: Sequence[int], lengths: Sequence[int], budgets: Sequence[int]
    ) -> tuple[dict[int, float], dict[str, Any]]:
        """(the sweep's speeds, what the worker said of itself); the warm-up round."""
        worker = self._worker(name)
        try:
            return sweep(worker, rows, lengths, budgets), worker.ready
        finally:
            self._let_go(name)

    def timed(self, name: str, budget: int, warm_up: Sequence[int]) -> dict[str, Any]:
        """One pass over all rows."""
        fresh = name not in self._live
        worker = self._worker(name)
        try:
            if fresh:
                worker.run(warm_up, budget)
            answer = worker.run(None, budget)
        finally:
            self._let_go(name)
        if "out_of_memory" in answer:
            raise WorkerError(f"{name}: {answer['out_of_memory']}")
        return answer

    def close(self) -> None:
        """End all workers."""
        for name in list(self._live):
            self._live.pop(name).close()

    def _worker(self, name: str) -> Worker:
        if name not in self._live:
            self._live[name] = Worker(name, self._commands[name], self._job, self._threads)
        return self._live[name]

    def _let_go(self, name: str) -> None:
        if not (self._keep and self._live[name].alive):
            self._live.pop(name).close()
