"""The worked plan of docs/scaling.md: `influence plan`'s cost model on a pool that is not there.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rows 1000000 --replicas 8 --gpu-hour 4

Operations come from `influence.cost` for the shape of an 8B Llama, at the speed of a GPU that
`influence plan` assumes; what the head does comes from `benchmarks/results/scaling.json` (see
`scaling_measured.py`) and `pool.json` (see `pool.py`), in proportion to rows or shards. Everything
else is an option, and so an assumption. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from influence import cost, speeds
from influence.certified import audit_rows, initial_landmarks
from influence.config import Config
from influence.load import Load
from influence.model_shape import ModelShape, model_shape
from ray_jobs.pool import REST_SECONDS

RESULTS = Path(__file__).parent / "results"
HOUR = 3600.0
#: Llama 3.1 8B.
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Step:
    """A part of the run.

    Attributes:
        seconds: wall time.
        limit: what decides it.
        gpu_seconds: of work, all GPUs together.
        held: seconds in which the GPU nodes are there; all of them, unless given.
    """

    name: str
    seconds: float
    limit: str
    gpu_seconds: float = 0.0
    held: float | None = None


def shape_of_llama(arguments: argparse.Namespace) -> tuple[Config, ModelShape]:
    """Config and shape; the folder of the model holds its description alone."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LLAMA).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
        config = Config.model_validate(
            {
                "run": "s3://bucket/run",
                "model": {"name": folder},
                "data": {"candidates": ["s3://bucket/pool/*.parquet"]},
                "targets": {"target": {"path": "s3://bucket/target.jsonl", "per": "group"}},
                "embedding": {"dim": arguments.dim},
                "replicas": {
                    "max": arguments.replicas,
                    "rows_per_shard": arguments.rows_per_shard,
                },
            }
        )
        return config, model_shape(config)


def embedding_flops(config: Config, shape: ModelShape, load: Load) -> float:
    """What `influence plan` counts for the embeddings of a load."""
    return cost.STAGES["embedding"](config, shape, load)


def gradient_flops(config: Config, shape: ModelShape, load: Load) -> float:
    """What `influence plan` counts for the gradients of a load."""
    return cost.STAGES["gradients"](config, shape, load)


class Worked:
    """The plan of one pool."""

    def __init__(self, arguments: argparse.Namespace, rows: int) -> None:
        self.of, self.rows = arguments, rows
        self.config, self.shape = shape_of_llama(arguments)
        measured = json.loads((RESULTS / "scaling.json").read_text())
        self.tokenising, self.record = measured["tokenising"], measured["record"][-1]
        self.catalogue, self.round = measured["catalogue"], measured["round"]
        self.verifying = measured["verifying"]
        pool = json.loads((RESULTS / "pool.json").read_text())["overhead"]
        self.overhead = max(case["driver_cpu_ms"]["median"] for case in pool) / 1e3
        self.rate = speeds.UNKNOWN_GPU * speeds.GPU_PART
        self.width = min(arguments.dim, 2 * self.shape.hidden)

    # --- counts ---

    @property
    def shards(self) -> int:
        """Of the whole pool, in one stage."""
        return math.ceil(self.rows / self.of.rows_per_shard)

    @property
    def exact_rows(self) -> int:
        """Rows with exact gradients of a certified run: all that it may take."""
        return min(self.rows, round(self.of.exact * self.rows))

    def load(self, rows: int) -> Load:
        """Rows of the measured mean length, each; attention takes more of unequal ones."""
        per_row = self.tokenising["tokens_per_row"], self.tokenising["response_tokens_per_row"]
        squares = round(rows * per_row[0] ** 2)
        return Load(rows, round(rows * per_row[0]), round(rows * per_row[1]), squares)

    def bytes_per_row(self) -> dict[str, float]:
        """Stored, by stage."""
        columns = self.catalogue["bytes_per_row_stored"]
        return {
            "catalogue": columns,
            "embedding": columns + 16 + 2 * self.width,
            "gradients": columns + 16 + 4 * self.config.gradients.dim,
            "scores of one round": 8 + 8 * (self.of.columns + 1),
        }

    # --- time ---

    def tokenise(self) -> Step:
        """One thread of every replica."""
        seconds = self.rows / (self.tokenising["rows_per_second"] * self.of.replicas)
        return Step("catalogue (tokenising)", seconds, "a core a replica")

    def on_gpus(self, name: str, flops: float) -> Step:
        """Model work, at the speed that `influence plan` assumes."""
        seconds = flops / self.rate
        return Step(name, seconds / self.of.replicas, "GPUs", seconds)

    def map_scores(self) -> float:
        """Seconds of one map: a replica makes its score shards one after the other."""
        size = self.bytes_per_row()["embedding"] * self.of.rows_per_shard
        one = 3 * self.of.latency + size / self.of.replica_bandwidth
        return math.ceil(self.shards / self.of.replicas) * one

    def reduce(self, *parts: str) -> float:
        """Seconds of the reducer in one round: what was measured, and what comes by network."""
        own = sum(self.round[f"{part}_seconds"] for part in parts)
        own *= self.rows / self.round["rows"]
        return own + self.round_bytes() / self.of.head_bandwidth

    def round_bytes(self) -> float:
        """What the head reads in a round: shards with new rows (all), and the scores, often."""
        per_row = self.bytes_per_row()
        walks = self.round["walks"] * per_row["scores of one round"]
        return self.rows * (per_row["embedding"] + walks)

    def steps(self, method: str) -> list[Step]:
        """The parts of a run of `uniform`, `certified` or `exact`."""
        everything = self.load(self.rows)
        if method == "exact":
            flops = gradient_flops(self.config, self.shape, everything)
            reading = self.rows * self.bytes_per_row()["gradients"] / self.of.head_bandwidth
            return [
                self.tokenise(),
                self.on_gpus("gradients of all rows", flops),
                Step("reading them", reading, "the head's network"),
                self.write(),
            ]
        rows, rounds, parts = self.of.landmarks, 1, ["embeddings", "selection"]
        if method == "certified":
            rows, rounds, parts = self.exact_rows, self.of.rounds, [*parts, "membership"]
        embedding = embedding_flops(self.config, self.shape, everything)
        gradients = gradient_flops(self.config, self.shape, self.load(rows))
        return [
            self.tokenise(),
            self.on_gpus("embeddings", embedding),
            self.on_gpus(f"gradients of {rows:,} rows", gradients),
            Step(f"maps to scores: {rounds}", rounds * self.map_scores(), "requests"),
            self.rounds(rounds, self.reduce(*parts)),
            self.write(),
        ]

    def rounds(self, rounds: int, each: float) -> Step:
        """The reducer's part. Replicas go after a minute of it, their nodes after the idle timeout;
        what went has to come again."""
        again = self.of.load if each > REST_SECONDS else 0.0
        kept = REST_SECONDS + self.of.idle_timeout
        again += self.of.node_start if each > kept else 0.0
        held = rounds * (min(each, kept) + again)
        return Step(f"reducer: {rounds}", rounds * (each + again), "a core of the head", held=held)

    def write(self) -> Step:
        """The score parts, as `benchmarks/reduce.py` writes them."""
        return Step("score parts", self.rows * self.of.writing, "a core of the head")

    # --- size ---

    def objects(self) -> dict[str, int]:
        """Of a certified run, by stage."""
        gradient_rows = self.config.replicas.gradient_rows_per_shard
        return {
            "catalogue": self.shards,
            "embedding": self.shards,
            "gradients": math.ceil(self.exact_rows / gradient_rows),
            "scores of all rounds (removed at the end)": self.shards * self.of.rounds,
        }

    def stored(self) -> dict[str, float]:
        """Bytes of the same."""
        per_row = self.bytes_per_row()
        return {
            "catalogue": self.rows * per_row["catalogue"],
            "embedding": self.rows * per_row["embedding"],
            "gradients": self.exact_rows * per_row["gradients"],
            "scores of all rounds (removed at the end)": self.rows
            * per_row["scores of one round"]
            * self.of.rounds,
        }

    def head(self) -> dict[str, str]:
        """What the head needs, and what it spends its time on."""
        units = 2 * self.shards + math.ceil(
            self.exact_rows / self.config.replicas.gradient_rows_per_shard
        )
        known = 2 * 8.0 * self.exact_rows * self.width
        arrays = self.rows * max(
            self.catalogue["peak_bytes_per_row"],
            self.catalogue["held_bytes_per_row"] + self.round["peak_bytes_per_row"],
        )
        write = self.record["seconds_per_write"] * units / self.record["shards"]
        size = self.record["bytes_per_shard"] * units
        verify = self.rows * self.bytes_per_row()["embedding"]
        speed = min(self.of.head_bandwidth, 1e6 * self.verifying["mb_per_second"])
        shard = embedding_flops(self.config, self.shape, self.load(self.of.rows_per_shard))
        answers = self.of.replicas * self.rate / shard
        return {
            "driver: shards of all stages": f"{units:,}",
            "driver: memory for them": gigabytes(units * self.record["peak_bytes_per_shard"]),
            "driver: answers, at most": f"{answers:.1f} a second",
            "driver: CPU for them": f"{answers * self.overhead:.1%} of a core",
            "driver: manifest.json": f"{size / 1e6:,.1f} MB, {write:.2g} s a write, every 5 s",
            "reducer: catalogue and a round's arrays": gigabytes(arrays),
            "reducer: embeddings of exact rows, float64, twice": gigabytes(known),
            "head: read in a round": gigabytes(self.round_bytes()),
            "head: verifying the embeddings of a resume": f"{gigabytes(verify)}, "
            f"{duration(verify / speed)}",
        }


def gigabytes(size: float) -> str:
    """1.2 GB; TB from a thousand on."""
    return f"{size / 1e12:,.1f} TB" if size >= 1e12 else f"{size / 1e9:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is readable."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / HOUR:,.1f} h"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bill(worked: Worked) -> str:
    """Hours and money of the three ways."""
    of, lines = worked.of, []
    for method in ("uniform", "certified", "exact"):
        steps = worked.steps(method)
        for step in steps:
            busy = f"{step.gpu_seconds / HOUR:,.1f}" if step.gpu_seconds else ""
            lines.append([method, step.name, duration(step.seconds), busy, step.limit])
        wall = sum(step.seconds for step in steps) / HOUR
        held = sum(s.seconds if s.held is None else s.held for s in steps) / HOUR * of.replicas
        busy = sum(step.gpu_seconds for step in steps) / HOUR
        money = held * of.gpu_hour + wall * of.head_hour
        total = f"{held:,.0f} GPU-hours held, {money:,.0f} USD"
        lines.append([method, "**together**", duration(wall * HOUR), f"{busy:,.1f}", total])
    return table(("run", "step", "time", "GPU-hours of work", "limited by"), lines)


def report(arguments: argparse.Namespace) -> str:
    """Everything, as Markdown."""
    small, large = Worked(arguments, arguments.rows), Worked(arguments, arguments.large)
    load, stages = small.load(1), {"embedding": embedding_flops, "gradients": gradient_flops}
    flops = ", ".join(
        f"{name} {count(small.config, small.shape, small.load(1000)) / 1e15:.2f} TFLOP"
        for name, count in stages.items()
    )
    first = initial_landmarks(small.rows, small.exact_rows, None)
    stored = zip(small.objects().items(), small.stored().values(), strict=True)
    parts = [
        f"A row has {load.tokens} tokens, {load.response_tokens} of them response, and costs: "
        f"{flops}. A certified run begins with {first:,} uniform landmarks and audits "
        f"{audit_rows(small.rows, None):,} rows.",
        bill(small),
        table(
            ("certified run", "objects", "bytes", f"objects, {large.rows:,} rows", "bytes"),
            [
                [
                    name,
                    f"{number:,}",
                    gigabytes(size),
                    f"{large.objects()[name]:,}",
                    gigabytes(large.stored()[name]),
                ]
                for (name, number), size in stored
            ],
        ),
        table(
            ("head", f"{small.rows:,} rows", f"{large.rows:,} rows"),
            [[name, text, large.head()[name]] for name, text in small.head().items()],
        ),
    ]
    return "\n\n".join(parts)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=10_000_000)
    add("--large", type=int, default=1_000_000_000, help="the second column: what breaks first")
    add("--replicas", type=int, default=64, help="of one GPU each")
    add("--dim", type=int, default=1024, help="embedding.dim")
    add("--rows-per-shard", type=int, default=4096)
    add("--columns", type=int, default=8, help="score columns")
    add("--landmarks", type=int, default=4096, help="of a run with uniform ones")
    add("--exact", type=float, default=0.03, help="part of the rows that a certified run may take")
    add("--rounds", type=int, default=25, help="of a certified run")
    add("--gpu-hour", type=float, default=3.0, help="USD")
    add("--head-hour", type=float, default=1.0, help="USD")
    add("--writing", type=float, default=2.3e-6, help="seconds a row; see docs/results.md")
    add("--load", type=float, default=120.0, help="seconds to load the model again")
    add("--idle-timeout", type=float, default=300.0, help="seconds; as in cluster.yaml")
    add("--node-start", type=float, default=240.0, help="seconds")
    add("--latency", type=float, default=0.05, help="seconds of a request to the store")
    add("--replica-bandwidth", type=float, default=200e6, help="bytes a second")
    add("--head-bandwidth", type=float, default=1.25e9, help="bytes a second")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print; returns the exit code."""
    print(report(parse(argv)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
