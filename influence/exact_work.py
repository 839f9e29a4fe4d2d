"""Which units hold the exact scores of a run: planned from names alone, then computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence.candidates import SourceFile
from influence.cost import check_target_bytes, check_vector_bytes
from influence.fingerprints import Fingerprint, fingerprint, optimizer_values
from influence.job import Job, run_units
from influence.optimizer_use import TARGET_GRADIENTS, scaled_stages
from influence.row_reuse import list_shards, reuse_rows
from influence.units import ExactUnits, Unit, range_units, sparse_units

Chosen = Sequence[tuple[SourceFile, Sequence[int]]]


@dataclass(frozen=True)
class ExactWork:
    """Every unit behind the exact scores.

    Attributes:
        vectors: full mean gradients of each target's columns (projection: exact).
        units: sketches, or inner products with those vectors.
        stage: the stage of the candidates' units: gradients or inner_products.
        lenders: keys of the candidates' shards that were made for another choice of rows.
        borrowed: number of rows that are read from those.
    """

    vectors: dict[str, list[Unit]]
    units: ExactUnits
    stage: str
    lenders: frozenset[str]
    borrowed: int


@dataclass
class _Candidates:
    """Collects the candidates' units of one run, over files and targets."""

    job: Job
    stage: str
    chosen: Chosen | None
    lenders: set[str]
    borrowed: int = 0

    def units(self, digest: str, needs: tuple[str, ...] = ()) -> list[Unit]:
        """Units of the chosen rows (None: all), and what the cache holds of them elsewhere."""
        rows = self.job.config.replicas.gradient_rows_per_shard
        if self.chosen is None:
            return range_units(self.stage, digest, self.job.files, rows, needs=needs)
        listed = list_shards(self.job.cache, self.stage, digest)
        found: list[Unit] = []
        for file, members in self.chosen:
            plan = sparse_units(self.stage, digest, file, members, rows, needs)
            reuse = reuse_rows(self.job.cache, plan, listed, rows, self.job.held_rows)
            found += reuse.units
            self.job.log.chosen(plan, reuse.units)
            self.lenders.update(unit.key for unit in reuse.lenders)
            self.borrowed += reuse.borrowed
        return found


def plan_exact(job: Job, reduce: Any, chosen: Chosen | None) -> ExactWork:
    """Plan the exact gradients of some rows (None: all) and the targets' own; computes nothing.

    With a random projection (or none) both are vectors, which a new target does not invalidate.
    With `projection: exact` the candidates' units hold inner products with the targets' full
    gradients, in shards of each target's own. Their names follow from the names of the targets'
    shards.
    """
    wanted = None
    if chosen is not None:
        wanted = {file.url: tuple(sorted(members)) for file, members in chosen}
    if job.config.gradients.projection != "exact":
        digest = job.fingerprints["gradients"].hex
        rows = job.config.replicas.gradient_rows_per_shard
        needs = () if job.layers_key is None else (job.layers_key,)
        # Those of the targets are apart where an optimiser's scale goes on one side only.
        own = TARGET_GRADIENTS if TARGET_GRADIENTS in job.fingerprints else "gradients"
        targets = {
            name: range_units(own, job.fingerprints[own].hex, files, rows, needs=needs)
            for name, files in job.target_files.items()
        }
        pool = _Candidates(job, "gradients", chosen, set())
        units = ExactUnits(pool.units(digest, needs), targets, {}, wanted)
        return ExactWork({}, units, pool.stage, frozenset(pool.lenders), pool.borrowed)
    vectors = target_vector_units(job, reduce)
    pool = _Candidates(job, "inner_products", chosen, set())
    products = {}
    for name, of_target in product_fingerprints(job, vectors).items():
        needs = tuple(unit.key for unit in vectors[name])
        job.fingerprints.setdefault("inner_products", of_target)
        products[name] = pool.units(of_target.hex, needs)
    units = ExactUnits([], {}, products, wanted)
    return ExactWork(vectors, units, pool.stage, frozenset(pool.lenders), pool.borrowed)


def product_fingerprints(job: Job, vectors: Mapping[str, list[Unit]]) -> dict[str, Fingerprint]:
    """What the inner products with each target's vectors are kept under (`projection: exact`).

    `vectors` are the units of `target_vector_units`: their names make the fingerprint.
    """
    values = job.fingerprints["target_vectors"].values
    if "inner_products" in scaled_stages(job.config):
        values = {**values, **optimizer_values(job.config)}
    return {
        name: fingerprint({**values, "target_vectors": [unit.key for unit in members]})
        for name, members in vectors.items()
    }


def target_vector_units(job: Job, reduce: Any) -> dict[str, list[Unit]]:
    """One unit for each column of every target, in the order of the columns."""
    digest = job.fingerprints["target_vectors"].hex
    return {
        name: [
            unit
            for file, rows in columns
            for unit in sparse_units("target_vectors", digest, file, rows, len(rows))
        ]
        for name, columns in reduce.target_rows().items()
    }


def exact_units(job: Job, reduce: Any, chosen: Chosen | None) -> ExactUnits:
    """The units of `plan_exact`, to be computed; the targets' full gradients are made here.

    Raises:
        InputError: with `projection: exact`, more full gradients than a replica can hold; with
            `projection: none`, shards that are too large.
    """
    work = plan_exact(job, reduce, chosen)
    vectors = [unit for members in work.vectors.values() for unit in members]
    shape = job.model_shape
    check_vector_bytes(job.config, shape)
    if vectors:
        check_target_bytes(job.config, shape, len(vectors))
        run_units(job, vectors)
    _note_borrowed(job, work)
    return work.units


def further_units(job: Job, reduce: Any, chosen: Chosen) -> ExactUnits:
    """Units of further rows, after `exact_units`: the targets' own are there."""
    work = plan_exact(job, reduce, chosen)
    _note_borrowed(job, work)
    return work.units


def _note_borrowed(job: Job, work: ExactWork) -> None:
    if work.borrowed:
        text = (
            f"{work.borrowed:,} rows are read from {len(work.lenders):,} shards "
            "that were made for another choice of rows"
        )
        job.progress.note(f"{work.stage}: {text}")
        job.log.begin(work.stage, job.fingerprints[work.stage], [])
        record = job.log.manifest.stages[work.stage]
        record.borrowed_rows += work.borrowed
        record.notes = sorted({*record.notes, text})
