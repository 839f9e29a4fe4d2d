"""What the rounds of a certified run take, before any score says how many there will be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from influence import shard_bytes
from influence.config import Config
from influence.exact_work import Chosen, ExactWork
from influence.input_bytes import input_bytes
from influence.membership import DRAWS
from influence.missing_work import MissingWork
from influence.quantities import Quantities, StageWork
from influence.result_bytes import WALKS, selected_rows
from influence.units import Unit


def most_work(
    missing: MissingWork,
    stage: StageWork,
    chosen: Chosen,
    columns: Sequence[int],
    extra: int,
    rounds: int,
) -> Quantities:
    """`stage` with all rows that rounds may add, of the other candidates' mean length.

    Args:
        stage: the gradients of the first landmarks, which are `chosen`.
        columns: score columns of every target.
        extra: rows that all rounds together add at most.
    """
    job = missing.job
    rest = missing.rest_load(chosen)
    load = rest.times(extra / max(1, rest.rows))
    products = stage.name == "inner_products"
    flops = missing.price(stage.name, replace(load, products=extra * sum(columns) * products))
    # A round's rows are cut anew in every file, and for inner products once for each target.
    rows = job.config.replicas.gradient_rows_per_shard
    chunks = min(extra, -(-extra // rows) + rounds * len(job.files))
    layouts = [missing.layout("gradients", 0)]
    if products:
        layouts = [missing.layout(stage.name, each) for each in columns]
    texts = missing.mean_texts
    empty = [shard_bytes.vector_shard(stage.name, x, 0, 0, 0, sparse=True) for x in layouts]
    whole = [shard_bytes.vector_shard(stage.name, x, extra, extra, texts) for x in layouts]
    files = [Unit("", "", file, 0, file.rows - 1) for file in job.files]
    least = stage.least
    return Quantities(
        shards=least.shards + chunks * len(layouts),
        bundles=least.bundles + chunks,
        rows=(least.rows or 0) + extra,
        tokens=(least.tokens or 0) + load.tokens,
        flops=(least.flops or 0) + flops,
        effort=least.effort + flops,
        read=least.read + rounds * input_bytes(files, 1),
        written=(least.written or 0) + sum(whole) + (chunks - 1) * sum(empty),
        objects=least.objects + chunks * len(layouts),
    )


def rows_of_others(missing: MissingWork, stage: str, exact: ExactWork) -> int:
    """About how many rows the cache holds of earlier rounds, which this run's may ask for."""
    candidates = exact.units.candidates
    keys = [unit.key for unit in candidates]
    folder, mine = keys[0].rsplit("/", 1)[0], set(keys)
    pool = tuple(file.content_hash for file in missing.job.files)
    others = {
        name: size
        for name, size in missing.stored.folder(folder).items()
        if name.startswith(pool) and f"{folder}/{name}" not in mine
    }
    layout = missing.layout(stage, len(candidates[0].needs))
    none, one = (
        shard_bytes.vector_shard(stage, layout, n, n, missing.mean_texts, sparse=True)
        for n in (0, 1)
    )
    return round(max(0, sum(others.values()) - none * len(others)) / (one - none))


def round_scores(config: Config, counts: Mapping[str, Any], columns: int) -> float:
    """Scores that the driver looks at in a round: the pool's, and in every draw of the unknown
    ones those that may be selected (several times as many as will be)."""
    rows = counts["rows"]
    plausible = min(rows, 5 * selected_rows(config.selection.budget, counts))
    return float((WALKS * rows + DRAWS * plausible) * (columns + 8))
