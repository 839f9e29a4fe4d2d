"""The reduce over a large pool: seconds against what the machine can do, and memory.

    python -m benchmarks.reduce --rows 1000000 --json
    python -m benchmarks.reduce --rows 1000000 --select 100000 --targets 200

Embedding shards of random unit rows are written to --folder first, unless they are there. Timed is
what a run does with them: the map from embeddings to score shards in worker processes of one thread
each, the selection, and the parts of scores/. Beside it the bound, measured in as many processes:
reading the bytes of the shards once, and the matrix products alone.

With --select K the score shards are random instead, and only the selection of K rows by round robin
is timed, for growing parts of the pool and of K.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from influence import landmarks, outputs, storage
from influence.budget import Budget
from influence.cache import Cache, vector_column
from influence.candidates import SourceFile
from influence.catalogue import Catalogue, build_catalogue
from influence.predictor import Mapper, read_predictor, regression_predictor, write_predictor
from influence.records import Fidelity, TargetFidelity
from influence.schemas import VectorLayout, catalogue_schema, score_shard_schema, shard_schema
from influence.score_shards import ShardTable, score_table_of, score_units
from influence.selected import ScoreColumns
from influence.selection import Rule
from influence.shard_reader import read_embeddings
from influence.table_selection import select_table
from influence.target_columns import Column, TargetColumns
from influence.units import Unit, range_units

FINGERPRINT = "0" * 32
GEMM_ROWS, GEMM_SECONDS = 1024, 3.0


class AnonymousPeak:
    """The largest memory of this process without mapped files, in MB, sampled while it is open."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._open = True
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._open:
            self.look()
            time.sleep(0.02)

    def look(self) -> float:
        """The peak so far."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                self.peak = max(self.peak, float(line.split()[1]) * 1.024e-3)
        return self.peak


def pool_file(rows: int) -> SourceFile:
    """A file that need not exist: its rows are in the cache."""
    return SourceFile("pool.parquet", f"{rows:032x}", rows, rows)


def row_columns(first: int, count: int) -> list[pa.Array]:
    """What a shard says of its rows beside their vectors."""
    rows = np.arange(first, first + count)
    texts: dict[str, Any] = {
        "id": pa.array([f"row-{row:09d}" for row in rows]),
        "row": rows,
        "source": pa.array([f"source {row % 11}" for row in rows]),
        "group": pa.nulls(count, pa.string()),
        "digest": pa.array([int(row).to_bytes(16, "little") for row in rows], pa.binary(16)),
        "n_tokens": np.full(count, 200, np.int32),
        "n_response_tokens": np.full(count, 80, np.int32),
        "truncated": np.zeros(count, bool),
        "reason": pa.nulls(count, pa.string()),
    }
    return [pa.array(texts[field.name], field.type) for field in catalogue_schema()]


def write_embedding(folder: str, width: int, unit: Unit) -> None:
    """One shard of random unit rows, unless it is there."""
    cache = Cache(folder)
    if storage.head(cache.locate(unit.key)) is not None:
        return
    vectors = np.random.default_rng(unit.first).standard_normal((unit.count, width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    half = vectors.astype(np.float16)
    layout = VectorLayout(dtype="float16", dim=width)
    arrays = [
        *row_columns(unit.first, unit.count),
        vector_column(half, np.zeros(unit.count, bool)),
        pa.array(np.ones(unit.count)),
        pa.nulls(unit.count, pa.float64()),
    ]
    cache.commit(unit, pa.Table.from_arrays(arrays, schema=shard_schema(layout)), {})


def write_scores_shard(folder: str, columns: int, unit: Unit) -> None:
    """One shard of random scores that have something in common, unless it is there."""
    cache = Cache(folder)
    if storage.head(cache.locate(unit.key)) is not None:
        return
    draw = np.random.default_rng(unit.first)
    values = draw.standard_normal((unit.count, columns + 1))
    values[:, :-1] += draw.standard_normal((unit.count, 1))
    layout = VectorLayout(dtype="float64", dim=columns + 1)
    rows = pa.array(np.arange(unit.first, unit.first + unit.count))
    column = vector_column(values, np.zeros(unit.count, bool))
    table = pa.Table.from_arrays([rows, column], schema=score_shard_schema(layout))
    cache.commit(unit, table, {})


_worker: dict[str, Any] = {}


def start_worker(folder: str, key: str) -> None:
    """What a replica holds: the cache and the predictor, on one thread."""
    torch.set_num_threads(1)
    predictor = read_predictor(folder, key)
    _worker.update(
        cache=Cache(folder), predictor=predictor, mapper=Mapper(predictor), peak=AnonymousPeak()
    )


def map_unit(unit: Unit) -> float:
    """Commit one score shard; returns this process's peak memory."""
    table = score_table_of(
        _worker["cache"].read(unit.needs[1]), _worker["predictor"], _worker["mapper"]
    )
    _worker["cache"].commit(unit, table, {})
    return _worker["peak"].look()


def read_unit(key: str) -> int:
    """Bytes of one shard, read and dropped."""
    return len(storage.read_bytes(_worker["cache"].locate(key)))


def gemm_rate(_index: int) -> float:
    """Floating point operations per second of this process's kernel-sized products."""
    centres = torch.from_numpy(_worker["predictor"].centres).float()
    x = torch.randn(GEMM_ROWS, centres.shape[1])
    operations, start = 0, time.perf_counter()
    while time.perf_counter() - start < GEMM_SECONDS:
        torch.matmul(x, centres.T)
        operations += 2 * len(x) * centres.numel()
    return operations / (time.perf_counter() - start)


def catalogue_of(rows: int, shard: int) -> Catalogue:
    """The catalogue of the random pool."""
    file = pool_file(rows)
    parts = (
        (
            file,
            pa.Table.from_arrays(
                row_columns(first, min(shard, rows - first)), schema=catalogue_schema()
            ),
        )
        for first in range(0, rows, shard)
    )
    return build_catalogue([file], parts, drop_duplicates=True)


def columns_of(count: int) -> TargetColumns:
    """So many targets of one column each."""
    names = tuple(f"target {i}" for i in range(count))
    return TargetColumns(tuple(Column(name, name, (0,)) for name in names), names)


def reduce(arguments: argparse.Namespace) -> dict[str, Any]:
    """Map, select and write; the bound beside it."""
    folder, rows = arguments.folder, arguments.rows
    units = range_units("embedding", FINGERPRINT, [pool_file(rows)], arguments.shard)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context) as makers:
        list(makers.map(partial(write_embedding, folder, arguments.width), units))
    peak = AnonymousPeak()
    catalogue = catalogue_of(rows, arguments.shard)
    ranks = np.arange(rows)
    cache = Cache(folder)
    chosen = np.sort(np.random.default_rng(1).choice(rows, arguments.landmarks, replace=False))
    X = read_embeddings(cache, units, catalogue, chosen)
    draw = np.random.default_rng(2).standard_normal((arguments.width, arguments.targets))
    model = landmarks.fit(X, np.tanh(X @ draw), kernel=arguments.kernel)
    key = write_predictor(folder, regression_predictor(model, lengths=False))
    wanted = score_units(units, key)
    for unit in wanted:
        storage.delete(cache.locate(unit.key))
    targets = columns_of(arguments.targets)
    rule = Rule(targets.target_of, ranks, Budget(share=0.05), "round_robin")
    with ProcessPoolExecutor(
        arguments.workers, context, initializer=start_worker, initargs=(folder, key)
    ) as workers:
        rates = list(workers.map(gemm_rate, range(arguments.workers)))
        start = time.perf_counter()
        read = sum(workers.map(read_unit, [unit.key for unit in units]))
        read_seconds = time.perf_counter() - start
        start = time.perf_counter()
        peaks = list(workers.map(map_unit, wanted))
        mapped = time.perf_counter() - start
        table = ShardTable(cache, wanted, catalogue, catalogue.scorable, arguments.targets)
        selection = select_table(rule, table).selection
        selected = time.perf_counter() - start
        fidelity = Fidelity(
            method="benchmark",
            exact=False,
            targets={name: TargetFidelity(score_halfwidth=0.1) for name in targets.names},
        )
        exact = np.zeros(rows, dtype=bool)
        order = np.argsort(selection.order)
        columns = ScoreColumns(
            targets,
            "round_robin",
            fidelity,
            exact,
            selection.order[order],
            selection.weights[order],
        )
        outputs.write_scores(str(Path(folder, "run")), catalogue, targets.names, table, columns)
        seconds = time.perf_counter() - start
    products = 2 * rows * arguments.landmarks * (arguments.width + arguments.targets)
    gemm_seconds = products / sum(rates)
    return {
        "rows": rows,
        "workers": arguments.workers,
        "seconds": seconds,
        "map_seconds": mapped,
        "selection_seconds": selected - mapped,
        "write_seconds": seconds - selected,
        "read_seconds": read_seconds,
        "gemm_seconds": gemm_seconds,
        "bytes": read,
        "flops": products,
        "of_bound": seconds / (read_seconds + gemm_seconds),
        "peak_mb": max(peak.look(), *peaks),
        "peak_mb_driver": peak.look(),
        "peak_mb_worker": max(peaks),
        "selected": len(selection.order),
    }


def selections(arguments: argparse.Namespace) -> dict[str, Any]:
    """Round robin over the score shards of growing pools, and of growing budgets."""
    folder, cache, peak = arguments.folder, Cache(arguments.folder), AnonymousPeak()
    catalogue = catalogue_of(arguments.rows, arguments.shard)
    digest = f"{arguments.targets:032x}"
    units = range_units("scores", digest, [pool_file(arguments.rows)], arguments.shard)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context) as makers:
        list(makers.map(partial(write_scores_shard, folder, arguments.targets), units))
    found = []
    quarters = [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)]
    for of_rows, of_select in quarters:
        some = units[: max(1, len(units) * of_rows // 4)]
        eligible = np.zeros(arguments.rows, dtype=bool)
        eligible[: some[-1].last + 1] = True
        table = ShardTable(cache, some, catalogue, eligible, arguments.targets)
        k = arguments.select * of_select // 4
        rule = Rule(np.arange(arguments.targets), np.arange(arguments.rows), Budget(rows=k))
        start = time.perf_counter()
        chosen = select_table(rule, table)
        found.append(
            {
                "rows": some[-1].last + 1,
                "selected": len(chosen.selection.order),
                "seconds": time.perf_counter() - start,
                "kept_rows": len(chosen.rows),
            }
        )
        print(found[-1], flush=True)
    return {"targets": arguments.targets, "cases": found, "peak_mb": peak.look()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000)
    add("--width", type=int, default=1024)
    add("--landmarks", type=int, default=1024)
    add("--targets", type=int, default=8)
    add("--kernel", default="laplace", choices=sorted(landmarks.KERNELS))
    add("--shard", type=int, default=10_000, help="rows of a shard")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--select", type=int, help="only select so many rows of random scores, by round robin")
    add("--folder", default=str(Path(tempfile.gettempdir(), "influence-reduce")))
    add("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    arguments = parse(argv)
    found = selections(arguments) if arguments.select else reduce(arguments)
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            text = f"{value:,.4g}" if isinstance(value, float) else str(value)
            print(f"{name:>18}: {text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
