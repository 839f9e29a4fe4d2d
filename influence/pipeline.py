"""The select job, top to bottom: catalogue -> gradients and embeddings -> scores -> selection.

How units are executed (in this process, on a pool of actors) is handed in, and so is the reducer:
nothing here knows of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from influence import storage
from influence.cache import Cache
from influence.candidates import SourceFile, scan_files
from influence.config import Config
from influence.errors import InputError, InterruptedRunError, ShardsFailedError
from influence.fingerprints import Fingerprint, fingerprint, stage_fingerprints
from influence.model_shape import model_shape
from influence.progress import Progress
from influence.replica import load_tokenizer
from influence.run_log import RunLog
from influence.tokenization import template_fingerprint
from influence.units import Bundle, ExactUnits, Unit, bundled, range_units, sparse_units
from influence.worker import UnitResult

MAX_EXACT_COLUMNS = 64
NEED_GRADIENTS = ("influence_distillation", "exact")


class Execute(Protocol):
    """Runs bundles of units in any order; reports each one exactly once."""

    def __call__(
        self,
        bundles: Sequence[Bundle],
        on_result: Callable[[Bundle, list[UnitResult]], None],
        on_failure: Callable[[Bundle, int, str], None],
        /,
    ) -> None: ...


@dataclass
class Job:
    """What the steps of one run share."""

    config: Config
    fingerprints: dict[str, Fingerprint]
    files: list[SourceFile]
    target_files: dict[str, list[SourceFile]]
    cache: Cache
    log: RunLog
    progress: Progress
    execute: Execute | None = None


def select(job: Job, execute: Execute, reduce: Any) -> dict[str, Any]:
    """Run the whole job and write the run directory; returns the reducer's summary.

    `job` is of `prepare`; `reduce` is a `Reducer` or anything with its methods.

    Raises:
        InputError: bad config or data.
        ShardsFailedError: some shards failed for good; everything else is committed.
    """
    config, log = job.config, job.log
    job = replace(job, execute=execute)
    storage.probe_create_only(config.cache_url)
    if config.method in NEED_GRADIENTS:
        log.manifest.coverage = model_shape(config).coverage
    log.save()
    try:
        pool, targets = catalogue(job)
        with timed(job, "catalogue"):
            log.manifest.counts = reduce.load_catalogue(pool, targets)
        METHODS[config.method](job, reduce)
        with timed(job, "selection"):
            summary = reduce.select()
        log.manifest.counts = summary["counts"]
    except ShardsFailedError:
        log.finish("failed")
        raise
    except (KeyboardInterrupt, InterruptedRunError):
        log.finish("interrupted")
        raise
    except Exception:
        log.finish("failed")
        raise
    log.finish("done")
    return summary


def prepare(config: Config, progress: Progress, log: RunLog | None = None) -> Job:
    """Find the files and fingerprint every stage; loads the tokenizer, but no model.

    Raises:
        InputError: files or model that are not there; nothing has been written then.
    """
    files = _scan("data.candidates", config.data.candidates, config.data.limit)
    target_files = {}
    for name, target in config.targets.items():
        target_files[name] = _scan(f"targets.{name}.path", [target.path], target.limit)
    template = template_fingerprint(load_tokenizer(config.model))
    return Job(
        config,
        stage_fingerprints(config, template),
        files,
        target_files,
        Cache(config.cache_url),
        log if log is not None else RunLog(config.run, config.method),
        progress,
    )


def _scan(key: str, patterns: Sequence[str], limit: int | None) -> list[SourceFile]:
    try:
        return scan_files(patterns, limit)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def catalogue(job: Job) -> tuple[list[Unit], dict[str, list[Unit]]]:
    """Tokenise every row of the pool and the targets (no model)."""
    pool, targets = catalogue_units(job)
    run_units(job, [*(unit for units in targets.values() for unit in units), *pool])
    return pool, targets


def catalogue_units(job: Job) -> tuple[list[Unit], dict[str, list[Unit]]]:
    """The catalogue's units: (pool, per target)."""
    digest = job.fingerprints["catalogue"].hex
    rows = job.config.replicas.rows_per_shard
    pool = range_units("catalogue", digest, job.files, rows)
    targets = {
        name: range_units(
            "catalogue", digest, files, rows, group_by=job.config.targets[name].group_by
        )
        for name, files in job.target_files.items()
    }
    return pool, targets


def influence_distillation(job: Job, reduce: Any) -> None:
    """Exact gradients for landmarks and targets, embeddings for all, a regression between them."""
    chosen = reduce.choose_landmarks()
    exact = exact_units(job, reduce, chosen)
    embedding = embedding_units(job)
    run_units(job, [*exact.all, *embedding])
    with timed(job, "regression"):
        reduce.score_landmarks(embedding, exact)


def exact(job: Job, reduce: Any) -> None:
    """First order with every row's gradient: the truth that approximations are judged by."""
    units = exact_units(job, reduce, None)
    run_units(job, units.all)
    with timed(job, "scores"):
        reduce.score_exact(units)


def rds(job: Job, reduce: Any) -> None:
    """RDS+ (arXiv 2503.01807): one forward pass, cosine of pooled hidden states."""
    embedding = embedding_units(job)
    digest = job.fingerprints["embedding"].hex
    rows = job.config.replicas.rows_per_shard
    targets = {
        name: range_units("embedding", digest, files, rows)
        for name, files in job.target_files.items()
    }
    run_units(job, [*(unit for units in targets.values() for unit in units), *embedding])
    with timed(job, "scores"):
        reduce.score_embeddings(embedding, targets)


def random(job: Job, reduce: Any) -> None:
    """A uniform draw: the baseline that every claim is judged against."""
    with timed(job, "scores"):
        reduce.score_random()


METHODS: dict[str, Callable[[Job, Any], None]] = {
    "influence_distillation": influence_distillation,
    "exact": exact,
    "rds": rds,
    "random": random,
}


def embedding_units(job: Job) -> list[Unit]:
    """Embeddings of every candidate."""
    return range_units(
        "embedding",
        job.fingerprints["embedding"].hex,
        job.files,
        job.config.replicas.rows_per_shard,
    )


def exact_units(
    job: Job, reduce: Any, chosen: Sequence[tuple[SourceFile, Sequence[int]]] | None
) -> ExactUnits:
    """Units for the exact gradients of some rows (None: all), and the targets' own.

    With `projection: kronecker` both are sketches, which a new target does not invalidate. With
    `projection: exact` the targets' full gradients are made here and now, and the candidates'
    units hold inner products with them, in shards of each target's own.
    """
    rows = job.config.replicas.gradient_rows_per_shard
    if job.config.gradients.projection == "kronecker":
        digest = job.fingerprints["gradients"].hex
        targets = {
            name: range_units("gradients", digest, files, rows)
            for name, files in job.target_files.items()
        }
        return ExactUnits(_candidate_units(job, "gradients", digest, chosen, rows, ()), targets, {})
    products = {}
    for name, units in target_vectors(job, reduce).items():
        needs = tuple(unit.key for unit in units)
        values = {**job.fingerprints["target_vectors"].values, "target_vectors": list(needs)}
        print_of_target = fingerprint(values)
        job.fingerprints.setdefault("inner_products", print_of_target)
        products[name] = _candidate_units(
            job, "inner_products", print_of_target.hex, chosen, rows, needs
        )
    return ExactUnits([], {}, products)


def target_vectors(job: Job, reduce: Any) -> dict[str, list[Unit]]:
    """Full mean gradients of every target's columns, in the order of the columns."""
    digest = job.fingerprints["target_vectors"].hex
    wanted = reduce.target_rows()
    count = sum(len(columns) for columns in wanted.values())
    if count > MAX_EXACT_COLUMNS:
        raise InputError(
            f"gradients.projection: exact keeps one full gradient for each of {count} target "
            f"rows or groups in every replica (at most {MAX_EXACT_COLUMNS}): use "
            "targets.NAME.per: group, or projection: kronecker"
        )
    units = {
        name: [
            unit
            for file, rows in columns
            for unit in sparse_units("target_vectors", digest, file, rows, len(rows))
        ]
        for name, columns in wanted.items()
    }
    run_units(job, [unit for members in units.values() for unit in members])
    return units


def run_units(job: Job, units: Sequence[Unit]) -> None:
    """Compute what the cache does not hold yet.

    Raises:
        ShardsFailedError: a unit failed for good (all others are committed).
    """
    by_stage: dict[str, list[Unit]] = {}
    for unit in units:
        by_stage.setdefault(unit.stage, []).append(unit)
    start = time.monotonic()
    with job.progress.checking(len(units)):
        present = job.cache.present([unit.key for unit in units])
        whole = job.cache.verify(sorted(present))
    missing: dict[str, Unit] = {}
    for stage, members in by_stage.items():
        job.log.begin(stage, job.fingerprints[stage], members)
        for unit in members:
            if unit.key in whole:
                job.log.reused(unit)
            else:
                missing.setdefault(unit.key, unit)
    for key in sorted(present - whole):
        job.progress.note(f"damaged shard, computed again: {key}")
    job.log.save()
    spent = dict.fromkeys(by_stage, 0.0)

    def on_result(bundle: Bundle, results: list[UnitResult]) -> None:
        for unit, result in zip(bundle.units, results, strict=True):
            job.log.done(unit.stage, result)
            spent[unit.stage] += result.seconds
            job.progress.advance(unit, result)

    def on_failure(bundle: Bundle, attempts: int, error: str) -> None:
        for unit in bundle.units:
            job.log.failed(unit, attempts, error)
            job.progress.failed(unit, error)

    if missing:
        if job.execute is None:
            raise RuntimeError("units to compute, but no executor: call select, or set job.execute")
        with job.progress.working({s: _of(missing, s) for s in by_stage}, len(whole)):
            job.execute(bundled(missing.values()), on_result, on_failure)
    wall, total = time.monotonic() - start, sum(spent.values())
    for stage, seconds in spent.items():
        # Stages share the replicas: each gets its part of the wall time by the time it held them.
        job.log.took(stage, wall * (seconds / total if total else 1 / len(spent)))
    failures = job.log.failures()
    if failures:
        job.log.save()
        raise ShardsFailedError(_failure_text(failures))


@contextmanager
def timed(job: Job, stage: str) -> Iterator[None]:
    """Add the block's wall time to a stage of the manifest."""
    start = time.monotonic()
    job.progress.note(f"{stage} ...")
    yield
    job.log.took(stage, time.monotonic() - start)


def _of(missing: Mapping[str, Unit], stage: str) -> int:
    return sum(unit.stage == stage for unit in missing.values())


def _candidate_units(
    job: Job,
    stage: str,
    digest: str,
    chosen: Sequence[tuple[SourceFile, Sequence[int]]] | None,
    rows: int,
    needs: tuple[str, ...],
) -> list[Unit]:
    if chosen is None:
        return range_units(stage, digest, job.files, rows, needs=needs)
    return [
        unit
        for file, members in chosen
        for unit in sparse_units(stage, digest, file, members, rows, needs)
    ]


def _failure_text(failures: Sequence[Any]) -> str:
    lines = [f"{len(failures)} shard(s) failed for good; everything else is committed."]
    lines += [
        f"  {failed.file} rows {failed.first}-{failed.last} ({failed.attempts} attempts): "
        f"{failed.error}"
        for failed in failures[:10]
    ]
    if len(failures) > 10:
        lines.append(f"  ... and {len(failures) - 10} more; see manifest.json")
    lines.append("Mend the cause and run the same command again: it goes on from there.")
    return "\n".join(lines)
