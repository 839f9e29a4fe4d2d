"""Which shards of a stage the cache lacks, and what computing and keeping them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from influence import cost, shard_bytes
from influence.config_checks import LAYERED
from influence.contamination_units import STAGE
from influence.exact_work import Chosen
from influence.fingerprints import embedding_values
from influence.input_bytes import file_bytes, input_bytes
from influence.job import Job
from influence.load import Load
from influence.model_shape import ModelShape
from influence.pool_units import catalogue_units, contamination_units
from influence.quantities import Quantities, StageWork
from influence.row_stages import row_stage
from influence.schemas import VectorLayout
from influence.stored import Stored
from influence.unit_loads import UnitLoad
from influence.units import FULL_VECTORS, Bundle, Unit, bundled

# What the file of a predictor takes beside its numbers.
PREDICTOR_BYTES = 2_000


def first_work(job: Job, replicas: int) -> list[StageWork]:
    """Tokenising, and comparing with the targets' texts where that is asked for."""
    compared = contamination_work(job, replicas) if STAGE in job.fingerprints else None
    return [catalogue_work(job, replicas), *([compared] if compared else [])]


def contamination_work(job: Job, replicas: int) -> StageWork:
    """Comparing the candidates with the targets' texts, as far as it is to do."""
    units = contamination_units(job)
    there = Stored(job.cache).sizes([unit.key for unit in units])
    missing = [unit for unit in units if unit.key not in there]
    held = sum(there.values())
    texts = {file.url: file for _name, file in units[0].against}.values()
    least = Quantities(
        shards=len(missing),
        bundles=len(missing),
        rows=sum(unit.count for unit in missing),
        effort=sum(file_bytes(u.file) * u.count / u.file.total_rows for u in missing),
        read=(replicas * sum(map(file_bytes, texts)) if missing else 0)
        + input_bytes(missing, replicas)
        + 2 * held,
        written=None if missing else 0,
        objects=len(missing),
    )
    keys = tuple(unit.key for unit in missing)
    print_ = job.fingerprints[STAGE]
    return StageWork(STAGE, least, None, print_, len(units), len(there), held, keys)


def catalogue_work(job: Job, replicas: int) -> StageWork:
    """Tokenising, as far as it is to do; before it is done nothing is known of tokens and texts.

    To find the files' contents, the job reads all of them, whatever the cache holds.
    """
    pool, targets = catalogue_units(job)
    units = [*pool, *(unit for members in targets.values() for unit in members)]
    there = Stored(job.cache).sizes([unit.key for unit in units])
    missing = list({unit.key: unit for unit in units if unit.key not in there}.values())
    files = {unit.file.url: unit.file for unit in units}.values()
    # Cached shards are read to be verified, and all once more to be put together.
    held = sum(there.values())
    least = Quantities(
        shards=len(missing),
        bundles=len(missing),
        rows=sum(unit.count for unit in missing),
        effort=sum(file_bytes(u.file) * u.count / u.file.total_rows for u in missing),
        read=sum(map(file_bytes, files)) + input_bytes(missing, replicas) + 2 * held,
        written=None if missing else 0,
        objects=len(missing),
    )
    keys = tuple(unit.key for unit in missing)
    print_ = job.fingerprints["catalogue"]
    return StageWork("catalogue", least, None, print_, len(units), len(there), held, keys)


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

    def token_scores(
        self, units: Sequence[Unit], columns: int, width: int, written: int
    ) -> StageWork:
        """In2Core's scores by a row's strongest token: the model once more, on every candidate."""
        loads = self.reduce.loads_of(units)
        load = sum((each.load for each in loads), Load())
        flops = self.price("token_scores", replace(load, products=columns * load.rows))
        predictor = 8 * columns * (width + columns) + PREDICTOR_BYTES
        least = Quantities(
            shards=len(units),
            bundles=len(units),
            rows=sum(unit.count for unit in units),
            tokens=sum(each.tokens for each in loads),
            flops=flops,
            effort=flops,
            read=input_bytes(units, self.replicas) + self.replicas * predictor,
            written=written + predictor,
            objects=len(units) + 1,
        )
        return StageWork("token_scores", least, shards=len(units))

    def price(self, stage: str, load: Load) -> float:
        """Operations of a load."""
        own = row_stage(self.job.config, stage)
        if own is not None:
            return own.flops(self.job.config, self.given_shape, load)
        return cost.STAGES[stage](self.job.config, self.shape, load)

    def rest_load(self, chosen: Chosen) -> Load:
        """Of the candidates that can be scored and are not among the chosen ones."""
        units = [Unit("", "", file, rows[0], rows[-1], tuple(rows)) for file, rows in chosen]
        taken = sum((each.load for each in self.reduce.loads_of(units)), Load())
        return self.reduce.pool_load() + taken.times(-1)

    def bundle_bytes(self, bundle: Bundle, load: UnitLoad) -> int:
        """What a bundle's shards will have."""
        if bundle.units[0].stage in FULL_VECTORS:
            return len(bundle.units) * shard_bytes.target_vector(self.shape.sizes)
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
        config, own = self.job.config.gradients, row_stage(self.job.config, stage)
        if own is not None:
            return own.layout(self.job.config, self.given_shape)
        if stage == "embedding":
            return VectorLayout(dtype="float16", dim=self.width)
        if stage in ("inner_products", "offset_products"):
            return VectorLayout(dtype="float32", dim=max(1, columns))
        if config.projection not in LAYERED:
            return VectorLayout(dtype="float32", dim=config.dim)
        blocks, offset, sizes = [], 0, self.shape.sizes
        most = config.layer_dim if config.projection == "layerwise" else max(sizes.values())
        for name, size in sizes.items():
            blocks.append((name, offset, min(size, most)))
            offset += min(size, most)
        return VectorLayout(dtype="float32", dim=offset, blocks=blocks, sizes=[*sizes.values()])

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        assert self.given_shape is not None  # a method that asks has a model
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

    @property
    def mean_texts(self) -> float:
        """Bytes of a row's texts, in the mean over all files."""
        return sum(self.texts.values()) / max(1, len(self.texts))
