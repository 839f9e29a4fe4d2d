"""How gradients.py speaks with its workers: a job file, one JSON document a line, real seconds.

A worker is a process of its own for one row of the table. It loads the job's model once, says
`{"ready": true, ...}`, and answers every command `{"rows": [...] or null, "budget": n}` with its
seconds, its tokens and its memory; it ends with its standard input. Peers' interpreters run this
file, too, so it imports torch, numpy and transformers alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradients_memory import Clock, Memory
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Job:
    """What all workers of a run share.

    model: a folder with a config.json and, unless `random_seed` is a number, the weights; random
    weights are drawn by every worker on its own device. rows: the .npz file of `write_rows`.
    dim: values of a projected gradient. side: of the two-sided projections. blocks, tangents: of
    the embeddings by forward-mode derivatives. gradient_bytes: for methods that hold unprojected
    gradients of a batch's rows, the room for them. peer_side: of bergson's two-sided projection.
    """

    model: str
    rows: str
    random_seed: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    dim: int = 8192
    side: int = 64
    blocks: int = 4
    tangents: int = 2
    lora_rank: int = 8
    gradient_bytes: float = 4e9
    peer_side: int = 16
    seed: int = 0


@dataclass(frozen=True)
class TokenRow:
    """Token ids of one row, and whether each is a response token (never the first)."""

    input_ids: np.ndarray
    response: np.ndarray


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded rows (b, t); labels are -100 off the response; `positions` in the given list."""

    positions: list[int]
    input_ids: Tensor
    labels: Tensor
    lengths: Tensor


# A run over batches; its dictionary goes into the answer beside seconds and memory.
Run = Callable[[Sequence[PaddedBatch], Clock], dict[str, Any]]
Make = Callable[[Any, Job], Run]
# (rows or all of them, tokens per batch) -> an answer.
Ask = Callable[[Sequence[int] | None, int], dict[str, Any]]


def write_job(path: Path, job: Job) -> None:
    """The job as JSON, for `read_job`."""
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


def read_job(path: str | Path) -> Job:
    """The job that `write_job` left."""
    return Job(**json.loads(Path(path).read_text(encoding="utf-8")))


def write_rows(path: Path, rows: Sequence[TokenRow]) -> None:
    """All rows side by side, with their lengths."""
    np.savez(
        path,
        lengths=np.array([len(row.input_ids) for row in rows]),
        input_ids=np.concatenate([row.input_ids for row in rows]).astype(np.int64),
        response=np.concatenate([row.response for row in rows]).astype(bool),
    )


def read_rows(path: str | Path) -> list[TokenRow]:
    """The rows that `write_rows` left, in their order."""
    with np.load(path) as found:
        ends = np.cumsum(found["lengths"])[:-1]
        pairs = zip(
            np.split(found["input_ids"], ends), np.split(found["response"], ends), strict=True
        )
        return [TokenRow(ids, response) for ids, response in pairs]


def grouped(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions by batch, longest first, rows x longest <= budget; budget 1: one row a batch."""
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def padded(rows: Sequence[TokenRow], budget: int, device: str | torch.device) -> list[PaddedBatch]:
    """The rows as batches of `grouped`, on the device."""
    lengths = [len(row.input_ids) for row in rows]
    batches = []
    for group in grouped(lengths, budget):
        own = torch.tensor([lengths[i] for i in group])
        ids = torch.zeros(len(group), int(own.max()), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        for k, i in enumerate(group):
            row = torch.from_numpy(rows[i].input_ids)
            ids[k, : len(row)] = row
            labels[k, : len(row)] = torch.where(torch.from_numpy(rows[i].response), row, IGNORED)
        batches.append(PaddedBatch(group, ids.to(device), labels.to(device), own.to(device)))
    return batches


def split_batch(batch: PaddedBatch, limit: int) -> list[PaddedBatch]:
    """The batch in parts of at most `limit` rows, each padded to its own longest row."""
    parts = []
    for first in range(0, len(batch.positions), limit):
        chosen = slice(first, first + limit)
        lengths = batch.lengths[chosen]
        width = int(lengths.max())
        parts.append(
            PaddedBatch(
                batch.positions[chosen],
                batch.input_ids[chosen, :width],
                batch.labels[chosen, :width],
                lengths,
            )
        )
    return parts


def load_model(job: Job) -> Any:
    """The job's model in eval mode; every parameter has been touched, so that it is in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, job.dtype)
    if job.random_seed is None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=dtype, attn_implementation="sdpa"
        )
        model.to(job.device)
    else:
        torch.manual_seed(job.random_seed)
        with torch.device(job.device):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(job.model), dtype=dtype, attn_implementation="sdpa"
            )
    model.eval()
    model.config.use_cache = False
    with torch.no_grad():
        sum(float(parameter.sum()) for parameter in model.parameters())
    return model


def serve(makers: Mapping[str, Make]) -> None:
    """The main function of a worker's script, whose arguments are NAME JOB [FD].

    Loads the job's model, makes the named run, and answers commands on the file descriptor
    (standard output by default) until standard input ends.
    """
    name, job = sys.argv[1], read_job(sys.argv[2])
    answers = os.fdopen(int(sys.argv[3]) if len(sys.argv) > 3 else 1, "w", encoding="utf-8")

    def say(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    ready, ask = opened(makers[name], job)
    say(ready)
    for line in sys.stdin:
        command = json.loads(line)
        say(ask(command["rows"], command["budget"]))


def opened(make: Make, job: Job) -> tuple[dict[str, Any], Ask]:
    """Load the model and make the run: (the first answer, a function that gives the others)."""
    torch.set_num_threads(job.threads)
    rows = read_rows(job.rows)
    memory = Memory(job.device)
    model = load_model(job)
    model_mb = memory.now_mb()
    run = make(model, job)
    clock = Clock(memory.synchronize)

    def ask(wanted: Sequence[int] | None, budget: int) -> dict[str, Any]:
        batches = padded(rows if wanted is None else [rows[i] for i in wanted], budget, job.device)
        memory.reset_peak()
        try:
            clock.start()
            found = run(batches, clock)
            seconds = clock.seconds()
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
        peak = memory.peak_mb()
        return {
            "seconds": seconds,
            "tokens": sum(int(batch.lengths.sum()) for batch in batches),
            "batches": len(batches),
            "peak_mb": peak,
            "model_mb": model_mb,
            "peak_over_model_mb": peak - model_mb,
            **found,
        }

    return {"ready": True, "model_mb": model_mb, "versions": _versions()}, ask


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "transformers", "bergson", "dattri"):
        with contextlib.suppress(PackageNotFoundError):  # most have no peer installed
            found[package] = version(package)
    return found
