"""Predicted and actual change of the target loss after one weighted step of the optimiser.

    python benchmarks/one_step.py --config CONFIG --set KEY=VALUE --curvature fisher \
        --curvature hvp --dev dev=DEV.jsonl --test test=TEST.jsonl --eta sgd=0.1 \
        --eta adamw=5e-4 --out FOLDER [--threads 1]
    python benchmarks/one_step.py --run gd1=RUN1 --run adam2=RUN2 ...

Every RUN is a done run whose weights are tried; `--config` makes them first, where they are not
done: gradient descent and AdamW, each in the first order and in the second with every
`--curvature`, for the largest of its step sizes. Tried is theta - eta (a * (G'w)/n + b), with the
optimiser step that the run's scores are about, taken on the model (after the run's warm-up) and
undone. The prediction is the Taylor expansion of the dev rows' mean loss along that very step, with
the exact gradient and one exact Hessian-vector product; beside it what the run itself had
predicted. All runs have to share model and warm-up. The model is where `model.device` says (auto: a
CUDA device, if there is one). A run whose result is in FOLDER is not tried again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import named_paths, read_scores, write_json
from jaxtyping import Float
from one_step_runs import CURVATURES, make_runs, parse_etas
from scipy.stats import spearmanr
from torch import Tensor

from influence.batching import Batch, make_batches
from influence.candidates import read_examples, scan_files
from influence.config import Config
from influence.config_loading import load_config
from influence.errors import InfluenceError, InputError
from influence.gradients import attributed_layers, mean_gradient, settled_layers
from influence.gradients.layers import Layer
from influence.gradients.weighted import weighted_gradients
from influence.held_out import row_losses
from influence.hvp import hessian_products
from influence.optimizer_step import OptimizerStep, load_step
from influence.own_training import with_made_training
from influence.replica import load_replica, load_tokenizer
from influence.tokenization import Encoded, Encoder, make_encoder

Direction = dict[str, Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Trial:
    """One model, the layers that the steps move, and the rows that judge them."""

    config: Config
    model: Any
    layers: list[Layer]
    encode: Encoder
    dev: list[Encoded]
    test: list[Encoded]
    token_budget: int

    def batches(self, rows: Sequence[Encoded]) -> list[Batch]:
        """Token-budgeted batches of the rows, on the model's device."""
        batches = make_batches(rows, self.token_budget)
        return [batch.to(self.layers[0].parameter.device) for batch in batches]


def load_trial(run: str, dev: str, test: str, limits: tuple[int, int], budget: int) -> Trial:
    """The model of a run, after its warm-up, and evenly spread rows of both files."""
    config = with_made_training(load_config(f"{run}/config.yaml"))
    gradients = config.gradients
    replica = load_replica(config.model, "float32", config.model.device)
    chosen = attributed_layers(
        replica.model, gradients.parameters, blocks=gradients.blocks, seed=config.seed
    )
    layers, _notes = settled_layers(replica.model, chosen)
    encode = make_encoder(load_tokenizer(config.model), config.data.max_length, config.data.loss_on)
    judged = [
        held_out(encode, path, limit) for path, limit in zip((dev, test), limits, strict=True)
    ]
    return Trial(config, replica.model, layers, encode, *judged, token_budget=budget)


def held_out(encode: Encoder, path: str, limit: int) -> list[Encoded]:
    """The first `limit` rows, as a target's `limit` takes them, that have response tokens."""
    (file,) = scan_files([path], limit)
    return [row for row in encode(read_examples(file, 0, file.rows - 1)) if row.reason is None]


def weighted_rows(trial: Trial, run: str) -> tuple[list[Encoded], Float[np.ndarray, " k"], int]:
    """The rows with weight, their weights, and n, the number of rows that the weights sum to."""
    data = trial.config.data
    files = scan_files(data.candidates, data.limit)
    examples = [row for file in files for row in read_examples(file, 0, file.rows - 1)]
    table = read_scores(run, ["score", "weight"])
    weights = np.nan_to_num(table.column("weight").to_numpy(zero_copy_only=False))
    if len(weights) != len(examples):
        raise InputError(f"{run}: {len(weights)} scores for {len(examples)} rows of its pool")
    chosen = np.flatnonzero(weights > 0)
    encoded = trial.encode([examples[row] for row in chosen])
    return encoded, weights[chosen], round(float(weights.sum()))


def step_of(trial: Trial, run: str, step: OptimizerStep) -> Direction:
    """a * (G'w)/n + b: what eta multiplies, by layer as its gradient is presented."""
    rows, weights, n = weighted_rows(trial, run)
    batches = trial.batches(rows)
    own = [torch.from_numpy(weights[batch.positions] / n)[:, None] for batch in batches]
    sums = weighted_gradients(
        trial.model,
        trial.layers,
        batches,
        own,
        reduction=trial.config.gradients.loss_reduction,
        scale=step.scale,
    )
    direction = {name: value[0] for name, value in sums.items()}
    for name, offset in (step.offset or {}).items():
        direction[name] = direction[name] + offset.to(direction[name])
    return direction


def expansion(trial: Trial, direction: Direction) -> tuple[float, float]:
    """(g_T'd, d'H_T d) of the dev rows' mean loss along a direction, both exact."""
    batches = trial.batches(trial.dev)
    reduction = trial.config.gradients.loss_reduction
    total, count = mean_gradient(
        trial.model, trial.layers, batches, reduction=reduction, normalize=False
    )
    slope = sum(float((total[name] * each).sum()) for name, each in direction.items()) / count
    alone = {name: each[None] for name, each in direction.items()}
    products, count = hessian_products(
        trial.model, trial.layers, batches, alone, reduction=reduction
    )
    bend = sum(float((products[name][0] * each).sum()) for name, each in direction.items())
    return slope, bend / count


@contextmanager
def stepped(trial: Trial, direction: Direction, eta: float) -> Iterator[None]:
    """The model after the step, and afterwards as it was, to the last bit."""
    before = [layer.parameter.detach().clone() for layer in trial.layers]
    with torch.no_grad():
        for layer in trial.layers:
            stored = layer.shape.stored(direction[layer.name], layer.parameter.shape)
            layer.parameter.sub_(eta * stored.to(layer.parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, value in zip(trial.layers, before, strict=True):
                layer.parameter.copy_(value)


def mean_losses(trial: Trial) -> dict[str, float]:
    """Mean over rows of the mean response loss, of dev and test."""
    return {
        name: float(np.mean(row_losses(trial.model, rows, trial.token_budget)))
        for name, rows in (("dev", trial.dev), ("test", trial.test))
    }


def try_run(
    trial: Trial, run: str, etas: Mapping[str, Sequence[float]], before: Mapping[str, float]
) -> dict[str, Any]:
    """The step of a run's weights: expansion, and what every step size does."""
    start = time.monotonic()
    config = load_config(f"{run}/config.yaml")
    own = with_made_training(config)
    if own.model != trial.config.model or own.gradients.parameters != (
        trial.config.gradients.parameters
    ):
        raise InputError(f"{run}: another model, warm-up or parameters than the first run's")
    step = load_step(own.optimizer.kind, own.optimizer.state, trial.model, trial.layers)
    direction = step_of(trial, run, step)
    slope, bend = expansion(trial, direction)
    tried = []
    for eta in etas[own.optimizer.kind]:
        with stepped(trial, direction, eta):
            after = mean_losses(trial)
        tried.append(
            {
                "eta": eta,
                "first": -eta * slope,
                "second": -eta * slope + eta**2 / 2 * bend,
                **{name: after[name] - before[name] for name in after},
            }
        )
    size = float(np.sqrt(sum(float((each**2).sum()) for each in direction.values())))
    return {
        "run": run,
        "optimizer": step.note,
        "order": config.weights.order,
        "curvature": config.weights.curvature if config.weights.order == 2 else None,
        "device": trial.layers[0].parameter.device.type,
        "slope": slope,
        "bend": bend,
        "step_norm": size,
        "tried": tried,
        "said": predicted_by(run),
        "seconds": time.monotonic() - start,
    }


def predicted_by(run: str) -> dict[str, Any] | None:
    """What the run's own objective says of its weights; None for a first-order one."""
    path = Path(run) / "fidelity.json"
    return json.loads(path.read_text(encoding="utf-8")).get("objective")


def correlations(runs: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Spearman of the weights (0 where a row is not selected) and rows in common, by pair."""
    weights = {
        name: np.nan_to_num(
            read_scores(run, ["weight"]).column("weight").to_numpy(zero_copy_only=False)
        )
        for name, run in runs.items()
    }
    names = list(runs)
    return {
        f"{a}, {b}": {
            "spearman": float(spearmanr(weights[a], weights[b])[0]),  # pyright: ignore
            "in_common": int(((weights[a] > 0) & (weights[b] > 0)).sum()),
        }
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def markdown(results: Mapping[str, dict[str, Any]]) -> str:
    """A line for each run and step size."""
    lines = [
        "| weights | eta | predicted, first order | predicted, second order | actual, dev | test |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        for each in result["tried"]:
            lines.append(
                f"| {name} | {each['eta']:g} | {each['first']:+.5f} | {each['second']:+.5f} | "
                f"{each['dev']:+.5f} | {each['test']:+.5f} |"
            )
    return "\n".join(lines)


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every run that has no result yet; returns all results."""
    etas = parse_etas(arguments.eta)
    runs = named_runs(arguments.run)
    if arguments.config is not None:
        curvatures = arguments.curvature or CURVATURES[:1]
        runs |= make_runs(arguments.config, arguments.set, curvatures, etas, arguments.directions)
    if not runs:
        raise InputError("expected --config CONFIG or --run NAME=RUN: there is nothing to try")
    ((_dev, dev),) = named_paths(arguments.dev, "--dev").items()
    ((_test, test),) = named_paths(arguments.test, "--test").items()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    limits = (arguments.dev_limit, arguments.test_limit)
    trial, before, results = None, {}, {}
    for name, run in runs.items():
        path = out / f"{name}.json"
        if not path.exists():
            if trial is None:
                first = next(iter(runs.values()))
                trial = load_trial(first, dev, test, limits, arguments.token_budget)
                before = mean_losses(trial)
            found = try_run(trial, run, etas, before)
            write_json(path, {**found, "before": before})
        results[name] = json.loads(path.read_text(encoding="utf-8"))
        print(markdown({name: results[name]}), flush=True)
    return {"results": results, "weights": correlations(runs)}


def named_runs(values: Sequence[str]) -> dict[str, str]:
    """{NAME: RUN} of NAME=RUN values."""
    runs = {}
    for value in values:
        name, equals, run = value.partition("=")
        if not (name and equals and Path(run).is_dir()):
            raise InputError(f"--run {value!r}: expected NAME=RUN, the directory of a done run")
        runs[name] = run
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Try what is missing and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--run", action="append", default=[], metavar="NAME=RUN")
    add("--config", help="config of the runs that are made, such as redundancy/step.yaml")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config")
    add("--curvature", action="append", choices=CURVATURES, help="of the second order; fisher")
    add("--directions", type=int, default=16, help="of hvp")
    add("--dev", action="append", required=True, metavar="NAME=FILE")
    add("--test", action="append", required=True, metavar="NAME=FILE")
    add("--dev-limit", type=int, default=64, help="first rows, as the target's limit")
    add("--test-limit", type=int, default=128)
    add("--eta", action="append", required=True, metavar="[KIND=]ETA", help="of one optimizer")
    add("--out", required=True, help="folder for a JSON file of each run, and all.json")
    add("--threads", type=int, default=2)
    add("--token-budget", type=int, default=1024)
    arguments = parser.parse_args(argv)
    try:
        found = work(arguments)
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    write_json(Path(arguments.out) / "all.json", found)
    print(markdown(found["results"]))
    for pair, each in found["weights"].items():
        print(f"{pair}: Spearman {each['spearman']:.3f}, {each['in_common']} rows in common")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
