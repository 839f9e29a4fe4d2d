"""Vectors of the cache as Parquet files with fixed-size lists, for people's own tools.

Shard by shard: nothing here holds the vectors of a pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from influence import storage
from influence.cache import Cache, DamagedShardError, Shard
from influence.candidates import short_names
from influence.catalogue import row_id
from influence.checkpoint_units import fingerprints_of
from influence.config import Config
from influence.errors import InputError
from influence.export_sources import Source, export_sources
from influence.hub import resolve_revision
from influence.methods import METHODS
from influence.own_training import with_made_training
from influence.pipeline import Job, prepare
from influence.progress import Progress
from influence.reference import with_reference
from influence.run_log import RunLog
from influence.schemas import ExportLayout, export_schema
from influence.shard_reader import read_ahead

NO_VECTOR = "its vector is zero or not finite"


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        rows: rows written below each folder.
        left_out: rows without a vector, by reason.
        repeated: rows that an earlier shard had, too.
        files: number of files.
        missing: shards that are not there, or damaged (with `partial`).
    """

    rows: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    files: int = 0
    missing: int = 0


def export_vectors(
    config: Config,
    stage: str,
    out: str,
    *,
    command: str = "influence.run_select(config)",
    partial: bool = False,
) -> Exported:
    """Write the vectors that the config's job has of its candidates and its targets.

    One file for each shard with a vector: OUT/candidates/part-*.parquet in the pool's order, and
    OUT/targets/NAME/part-*.parquet. `gradients` of a method that chooses rows are those of the
    shards that its run has read, whatever choice of rows they were made for.

    Args:
        stage: embedding or gradients.
        out: a folder or s3://..., with nothing in it.
        command: what the user would type to compute what is missing; for messages.
        partial: export what is there, even if shards are missing.

    Raises:
        InputError: nothing to export with these settings, `out` is in use, or, unless `partial`,
            shards are missing or damaged.

    Example:
        >>> influence.export_vectors(config, "embedding", "vectors").rows["candidates"]
        68
    """
    _check_stage(config, stage)
    if storage.list_objects(out):
        raise InputError(f"--out {out}: there are files in it; name a folder that is empty or new")
    config = with_made_training(resolve_revision(with_reference(config)))
    job = prepare(config, Progress(quiet=True), RunLog.unsaved(config.run, config.method))
    sources = export_sources(job, stage, command, partial)
    keys = [source.key for source in sources]
    present = job.cache.present(keys)
    if len(present) < len(set(keys)) and not partial:
        raise InputError(
            f"{stage}: {len(present):,} of {len(set(keys)):,} shards are in {config.cache_url}; "
            f"`{command}` computes the others, --partial exports those that are there"
        )
    done = Exported(missing=len(set(keys) - present))
    writer = _Writer(job, stage, out, done)
    there = [source for source in sources if source.key in present]
    for number, (source, shard) in enumerate(_shards(job.cache, there)):
        if shard is not None:
            writer.write(number, source, shard)
        elif partial:
            done.missing += 1
        else:
            raise InputError(
                f"{job.cache.locate(source.key)}: damaged, and {out} is not complete; `{command}` "
                f"computes it again (empty {out} before the next export), --partial exports the "
                "others"
            )
    return done


def _check_stage(config: Config, stage: str) -> None:
    makes = METHODS[config.method].vectors
    if stage not in makes:
        able = [method for method in METHODS if stage in METHODS[method].vectors]
        makes_only = f"{makes[0]} only" if makes else "no vectors"
        raise InputError(
            f"--stage {stage}: method: {config.method} computes {makes_only}; with --set "
            f"method={able[0]} it would ({' or '.join(able)})"
        )
    if stage == "gradients" and config.gradients.projection == "exact":
        raise InputError(
            "--stage gradients: gradients.projection: exact keeps inner products with the targets' "
            "gradients, but no gradient; kronecker and others keep a projected one, none the whole"
        )


def _shards(cache: Cache, sources: list[Source]) -> Iterator[tuple[Source, Shard | None]]:
    """The shards in order, None for a damaged one; a bar on a terminal."""

    def read(source: Source) -> Shard | None:
        try:
            return cache.read(source.key)
        except DamagedShardError:
            return None

    console = Console(stderr=True)
    yield from track(
        read_ahead(sources, read),
        description="shards",
        total=len(sources),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class _Writer:
    """Puts one file for each shard that has a vector, and counts."""

    def __init__(self, job: Job, stage: str, out: str, done: Exported) -> None:
        self._stage, self._out, self._done = stage, out, done
        self._prints = {found.hex: found for found in fingerprints_of(job)}
        # Rows without an id are called as in the results: by names within the pool, or the target.
        self._names = {"candidates": short_names([file.url for file in job.files])}
        for name, files in job.target_files.items():
            self._names[f"targets/{name}"] = short_names([file.url for file in files])
        # Whole ranges never overlap; shards that were made for several choices of rows may.
        self._chosen = METHODS[job.config.method].draws_landmarks and stage == "gradients"
        self._seen: dict[tuple[str, str], set[int]] = {}

    def write(self, number: int, source: Source, shard: Shard) -> None:
        """Write the rows of a shard that have a vector and were in no shard before."""
        kept = self._kept(source, shard)
        if not kept.any():
            return
        table = self._table(source, shard, kept)
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            compression="none",  # vectors hardly shrink
            use_dictionary=False,
            write_statistics=False,
            row_group_size=table.num_rows,
        )
        url = storage.join(self._out, source.folder, f"part-{number:06d}.parquet")
        storage.put(url, sink.getvalue().to_pybytes())
        self._done.files += 1
        self._done.rows[source.folder] += table.num_rows

    def _kept(self, source: Source, shard: Shard) -> np.ndarray:
        table = shard.table
        kept = np.asarray(table.column("vector").is_valid())
        reasons = table.column("reason").filter(pa.array(~kept)).to_pylist()
        self._done.left_out.update(reason or NO_VECTOR for reason in reasons)
        if self._chosen:
            seen = self._seen.setdefault((source.folder, source.file.url), set())
            rows = table.column("row").to_pylist()
            again = kept & np.asarray([row in seen for row in rows])
            self._done.repeated += int(again.sum())
            kept &= ~again
            seen.update(row for row, new in zip(rows, kept, strict=True) if new)
        return kept

    def _table(self, source: Source, shard: Shard, kept: np.ndarray) -> pa.Table:
        # The targets' gradients are a stage of their own where an optimiser scales one side.
        layout, print_ = shard.layout, self._prints[source.key.split("/")[1]]
        schema = export_schema(
            ExportLayout(
                stage=self._stage,
                fingerprint=print_.hex,
                values=print_.values,
                dtype=layout.dtype,
                dim=layout.dim,
                blocks=layout.blocks,
                sizes=layout.sizes,
                shard=source.key,
            )
        )
        rows = shard.table.filter(pa.array(kept))
        name = self._names[source.of][source.file.url]
        ids = zip(rows.column("id").to_pylist(), rows.column("row").to_pylist(), strict=True)
        columns = {
            "id": [row_id(given, name, row) for given, row in ids],
            "source": rows.column("source"),
            "file": [name] * rows.num_rows,
            "row": rows.column("row"),
            "vector": _fixed_size_lists(shard.vectors()[kept], schema.field("vector").type),
            "norm": rows.column("norm"),
            "n_tokens": rows.column("n_tokens"),
        }
        return pa.table(columns, schema=schema)


def _fixed_size_lists(vectors: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    """An array (n x dim) as a column of fixed-size lists, to the bit."""
    flat = np.ascontiguousarray(vectors).reshape(-1)
    buffers: list = [None, pa.py_buffer(flat)]
    values = pa.Array.from_buffers(kind.value_type, len(flat), buffers)  # pyright: ignore
    return pa.FixedSizeListArray.from_arrays(values, type=kind)
