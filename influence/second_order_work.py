"""What the second order's own stages take, before any gradient says which directions there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from influence import cost, shard_bytes
from influence.config import Config
from influence.curvature_stages import (
    STAGE,
    has_offset,
    hessian_fingerprint,
    offset_product_units,
    offset_unit,
)
from influence.exact_work import Chosen
from influence.load import Load
from influence.missing_work import MissingWork
from influence.quantities import Quantities, StageWork, driver_seconds
from influence.units import SHARED, Unit

NOTE = (
    "directions: which ones they are follows from the landmarks' gradients; counted as if none "
    "were in the cache"
)


def further_columns(config: Config, counts: Mapping[str, Any]) -> int:
    """Numbers that a row gets beside its scores."""
    if config.weights.order == 1:
        return 0
    if config.weights.curvature == "hvp":
        return config.weights.directions
    targets = counts["targets"].values()
    rows, columns = (sum(each[name] for each in targets) for name in ("scored", "columns"))
    return rows if rows > columns else 0


def second_order_work(
    missing: MissingWork, counts: Mapping[str, Any], gradients: StageWork, chosen: Chosen | None
) -> Iterator[StageWork]:
    """The stages in the order of the run; `gradients` is that of the landmarks, `chosen` they."""
    job, config = missing.job, missing.job.config
    hvp = config.weights.curvature == "hvp"
    if has_offset(config):
        units = [u for members in offset_product_units(job).values() for u in members]
        yield missing.stage("offset_products", units)
    count = config.weights.directions + (1 if has_offset(config) else 0)
    vector = shard_bytes.target_vector(missing.shape.sizes)
    operations, read = 0.0, 0
    if hvp:
        load = _landmarks(missing, chosen)
        yield _directions(missing, load, vector)
        if has_offset(config):
            yield missing.stage("offset_vector", [offset_unit(job)])
        products = _products(missing, count, vector)
        yield products
        length = missing.layout("gradients", 0).dim
        operations = 2.0 * load.rows**2 * length + 2.0 * count**2 * missing.shape.attributed
        read = gradients.whole + 2 * count * vector
    elif further_columns(config, counts):
        read = gradients.whole
    yield StageWork(
        STAGE, Quantities(effort=driver_seconds(2, operations), read=read), replicas=False
    )


def _landmarks(missing: MissingWork, chosen: Chosen | None) -> Load:
    """Of the rows that directions are chosen from: drawn ones, where all rows are exact."""
    if chosen is not None:
        units = [Unit("directions", "", f, rows[0], rows[-1], tuple(rows)) for f, rows in chosen]
        return sum((each.load for each in missing.reduce.loads_of(units)), Load())
    pool = missing.reduce.pool_load()
    drawn = min(missing.job.config.landmarks.count, pool.rows)
    return pool.times(drawn / max(1, pool.rows))


def _directions(missing: MissingWork, load: Load, vector: int) -> StageWork:
    count = missing.job.config.weights.directions
    priced = Load(
        load.rows, load.tokens, load.response_tokens, load.squares, products=count * load.rows
    )
    flops = cost.STAGES["directions"](missing.job.config, missing.shape, priced)
    least = Quantities(
        shards=count,
        bundles=1,
        rows=load.rows,
        tokens=load.tokens,
        flops=flops,
        effort=flops,
        written=count * vector,
        objects=2 * count,
    )
    return StageWork("directions", least, shards=count)


def _products(missing: MissingWork, count: int, vector: int) -> StageWork:
    """Products with each direction, at least one unit for every target's file."""
    job = missing.job
    files = [file for files in job.target_files.values() for file in files]
    units = [Unit("hessian_products", "", file, 0, file.rows - 1) for file in files]
    once = sum((each.load for each in missing.reduce.loads_of(units)), Load())
    # Of directions that share a pass: rows and tokens count once.
    passes = ceil(count / (SHARED["hessian_products"] or count))
    load = replace(once.times(passes), products=count * once.rows)
    flops = cost.STAGES["hessian_products"](job.config, missing.shape, load)
    shards = count * len(files)
    least = Quantities(
        shards=shards,
        bundles=passes * len(files),
        rows=load.rows,
        tokens=load.tokens,
        flops=flops,
        effort=flops,
        read=shards * vector,
        written=shards * vector,
        objects=shards,
    )
    return StageWork("hessian_products", least, None, hessian_fingerprint(job, []), shards)
