"""Which shards of a stage the cache lacks, and what computing and keeping them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from influence import cost, shard_bytes
from influence.exact_work import Chosen
from influence.fingerprints import embedding_values
from influence.input_bytes import input_bytes
from influence.job import Job
from influence.load import Load
from influence.model_shape import ModelShape
from influence.pool_units import catalogue_units
from influence.quantities import Quantities, StageWork
from influence.schemas import VectorLayout
from influence.stored import Stored
from influence.unit_loads import UnitLoad
from influence.units import Bundle, Unit, bundled


@dataclass
class MissingWork:
    """Counts the missing shards of a job whose catalogue is in the cache.

    Args:
        job: of `influence.pipeline.prepare`.
        reduce: a reducer that has loaded the catalogue.
        shape: the model's; None for a method without one.
        replicas: that work at once.
    """

    job: Job
    reduce: Any
    given_shape: ModelShape | None
    replicas: int

    def stage(self, name: str, units: Sequence[Unit]) -> StageWork:
        """A stage of these units."""
        there = self.stored.sizes([unit.key for unit in units])
        missing = {unit.key: unit for unit in units if unit.key not in there}
        bundles = bundled(missing.values())
        loads = self.reduce.loads_of([bundle.units[0] for bundle in bundles]) if bundles else []
        load = Load()
        for bundle, each in zip(bundles, loads, strict=True):
            columns = sum(len(unit.needs) for unit in bundle.units)
            load += replace(each.load, products=columns * each.load.rows)
        held = sum(there.values())
        flops = self.price(name, load)
        least = Quantities(
            shards=len(missing),
            bundles=len(bundles),
            rows=sum(each.rows for each in loads),
            tokens=sum(each.tokens for each in loads),
            flops=flops,
            effort=flops,
            read=held + input_bytes([bundle.units[0] for bundle in bundles], self.replicas),
            written=sum(map(self.bundle_bytes, bundles, loads)),
            objects=len(missing),
        )
        number = len({unit.key for unit in units})
        print_ = self.job.fingerprints[name]
        return StageWork(name, least, None, print_, number, len(there), held, tuple(missing))

    def price(self, stage: str, load: Load) -> float:
        """Operations of a load."""
        return cost.STAGES[stage](self.job.config, self.shape, load)

    def rest_load(self, chosen: Chosen) -> Load:
        """Of the candidates that can be scored and are not among the chosen ones."""
        units = [Unit("", "", file, rows[0], rows[-1], tuple(rows)) for file, rows in chosen]
        taken = sum((each.load for each in self.reduce.loads_of(units)), Load())
        return self.reduce.pool_load() + taken.times(-1)

    def bundle_bytes(self, bundle: Bundle, load: UnitLoad) -> int:
        """What a bundle's shards will have."""
        if bundle.units[0].stage == "target_vectors":
            return shard_bytes.target_vector(self.shape.sizes)
        return sum(
            shard_bytes.vector_shard(
                unit.stage,
                self.layout(unit.stage, len(unit.needs)),
                load.rows,
                load.vectors,
                self.texts.get(unit.file.url, 0.0),
                sparse=unit.rows is not None,
            )
            for unit in bundle.units
        )

    def layout(self, stage: str, columns: int) -> VectorLayout:
        """How a stage's vectors are kept."""
        config = self.job.config.gradients
        if stage == "embedding":
            return VectorLayout(dtype="float16", dim=self.width)
        if stage == "inner_products":
            return VectorLayout(dtype="float32", dim=columns)
        if config.projection != "none":
            return VectorLayout(dtype="float32", dim=config.dim)
        blocks, offset = [], 0
        for name, size in self.shape.sizes.items():
            blocks.append((name, offset, size))
            offset += size
        return VectorLayout(dtype="float32", dim=offset, blocks=blocks)

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        assert self.given_shape is not None  # only method: random has no model
        return self.given_shape

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        config = self.job.config.embedding
        jvp = embedding_values(self.job.config)["embedding"] == "jvp"
        return min(config.dim, self.shape.hidden * (config.tangents if jvp else 1))

    @cached_property
    def stored(self) -> Stored:
        """The cache's listing."""
        return Stored(self.job.cache)

    @cached_property
    def texts(self) -> dict[str, float]:
        """Bytes of a row's texts, by the URL of its file."""
        pool, targets = catalogue_units(self.job)
        of: dict[str, list[Unit]] = {}
        for unit in [*pool, *(unit for members in targets.values() for unit in members)]:
            of.setdefault(unit.file.url, []).append(unit)
        found = {}
        for url, units in of.items():
            sizes = self.stored.sizes([unit.key for unit in units])
            rows = sum(unit.count for unit in units if unit.key in sizes)
            found[url] = shard_bytes.texts_of_row(len(sizes), rows, sum(sizes.values()))
        return found
