"""Evaluation `fidelity`: predicted scores against exact ones, over a grid of settings.

Exact scores of a random part of the pool are the truth. Regressions on some of these rows, with
other numbers of landmarks, embeddings, kernels and dampings, are held against it, with what the
certificate says of each from its landmarks alone, and with what each costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from influence import storage
from influence.config import Config
from influence.config_checks import check_together
from influence.config_fidelity import FidelityConfig
from influence.embedding_choice import kinds_to_compare
from influence.embedding_kind import EmbeddingKind, embedding_fingerprint
from influence.evaluations.fidelity_document import (
    About,
    Certified,
    EmbeddingCost,
    Fidelity,
    SettingFigures,
    certified_figures,
    setting_figures,
)
from influence.evaluations.fidelity_reduce import FidelityReduce
from influence.evaluations.fidelity_shown import plots, table
from influence.evaluations.kind import Evaluation
from influence.evaluations.own_run import kept_sections, load_catalogue
from influence.exact_price import embedding_flops, gradient_flops
from influence.exact_work import Chosen, exact_units
from influence.fidelity_grid import Setting, settings_of
from influence.job import Job, run_units, timed
from influence.model_shape import model_shape
from influence.row_reuse import list_shards, reuse_rows
from influence.run_log import read_manifest
from influence.units import Unit, range_units, sparse_units

NAME = "fidelity"
_SECTIONS = ("model", "data", "landmarks", "selection", "optimizer", "replicas", "seed", "prices")


def settings(config: Config) -> Config:
    """The user's own gradients and landmarks, with exact scores for every row that is looked at.

    Raises:
        InputError: gradients that do not go with `method: exact`.
    """
    given = config.model_dump(exclude_unset=True)
    gradients = config.gradients.model_dump() if config.method != "in2core" else {}
    if config.weights.order == 2:
        gradients.pop("normalize", None)
    own = Config.model_validate(
        {
            **kept_sections(config, _SECTIONS),
            "run": storage.join(config.run, "evaluations", NAME),
            "cache": config.cache_url,
            "targets": given["targets"],
            "method": "exact",
            "gradients": gradients,
            "embedding": _own_embedding(config),
            "evaluation": {NAME: config.evaluation.fidelity},
        }
    )
    check_together(own, f"evaluation.{NAME}")
    return own


def _own_embedding(config: Config) -> dict[str, Any]:
    """Of `auto` the embedding that the run has chosen, if it has."""
    values = config.embedding.model_dump()
    if config.embedding.kind == "auto":
        manifest = read_manifest(config.run)
        if manifest is not None and manifest.embedding is not None:
            values |= EmbeddingKind(*manifest.embedding.settings)._asdict()
        else:
            values |= {"kind": "jvp"}
    return values


def inputs(_: Config) -> None:
    """Nothing beside the rows' text."""


def run(job: Job, reduce: Any, _: None) -> dict[str, Any]:
    """Exact scores, every embedding of the same rows, and the grid on them.

    Raises:
        InputError: fewer than 16 rows have exact scores, or a model without so many blocks.
        ShardsFailedError: some shards failed for good.
    """
    section = job.config.evaluation.fidelity
    assert section is not None
    load_catalogue(job, reduce)
    shape = job.shape = model_shape(job.config)
    job.log.manifest.coverage = shape.coverage
    chosen = None if section.pilot is None else reduce.draw(section.pilot)
    exact = exact_units(job, reduce, chosen)
    run_units(job, exact.all)
    with timed(job, "truth"):
        truth = reduce.take_truth(exact)
    kinds = kinds_to_compare(job.config, shape)
    grid, left_out = grid_of(job.config, section, truth["pilot"], len(kinds))
    load = reduce.pool_load()
    gradient = gradient_flops(job.config, shape, load, reduce.column_count()) / max(1, load.rows)
    embeddings, figures, certified = [], {}, []
    for place, kind in enumerate(kinds):
        units = embedding_units(job, kind, chosen)
        seconds = _timed_embedding(job, units)
        flops = embedding_flops(job.config, shape, load, kind) / max(1, load.rows)
        embeddings.append(EmbeddingCost(label=kind.label, flops=flops, seconds=seconds))
        mine = [each for each in grid if each.embedding == place]
        with timed(job, "grid", quiet=True):
            job.progress.note(f"{kind.label}: {len(mine)} settings, {section.repeats} draws ...")
            trials = reduce.measure(units, mine, section.repeats)
            figures |= dict(zip(mine, trials, strict=True))
            for recall, draws in rounds_of(job.config, section, own=place == 0):
                played = reduce.play(units, recall, draws)
                certified.append(certified_figures(kind.label, recall, played, truth["pilot"]))
    about = About(
        **truth,
        design=section.design,
        repeats=section.repeats,
        left_out=left_out,
        gradient_flops=gradient,
        gradient_seconds=_row_seconds(job, exact.candidates[0].stage),
        projection=job.config.gradients.projection,
        model=job.config.model.name,
        adapter=job.config.model.adapter,
    )
    return _document(about, grid, embeddings, figures, certified)


def _document(
    about: About,
    grid: Sequence[Setting],
    embeddings: list[EmbeddingCost],
    figures: Mapping[Setting, Any],
    certified: list[Certified],
) -> dict[str, Any]:
    shown: list[SettingFigures] = []
    for setting in grid:
        cost = embeddings[setting.embedding]
        exact = about.gradient_flops * setting.landmarks / about.pool
        shown.append(
            setting_figures(setting, cost.label, cost.flops + exact, figures[setting], about.names)
        )
    found = Fidelity(settings=shown, certified=certified, embeddings=embeddings, about=about)
    return found.model_dump(mode="json")


def grid_of(
    config: Config, section: FidelityConfig, rows: int, embeddings: int
) -> tuple[list[Setting], list[int]]:
    """The settings, the config's own first, and the numbers of landmarks that the rows are too few
    for: a fifth of them at least is to be predicted.

    The own one has as many landmarks as the config, but a third of the rows at most: then the
    largest of the grid's that is within that, or else that third.
    """
    most, landmarks = rows * 4 // 5, config.landmarks
    counts = [count for count in section.landmarks if count <= most]
    own = landmarks.count
    if own > rows // 3:
        own = max((c for c in counts if c <= rows // 3), default=max(4, rows // 3))
    center = Setting(0, own, landmarks.kernel, landmarks.damping)
    full = section.design == "full"
    grid = settings_of(center, embeddings, counts, section.kernels, section.damping, full=full)
    return grid, sorted({count for count in section.landmarks if count > most})


def rounds_of(config: Config, section: FidelityConfig, *, own: bool) -> list[tuple[float, int]]:
    """(recall, draws) of the certified rounds with one embedding; they take longer than the rest.

    A star has all recalls for the config's own embedding, and for the others the config's recall,
    once.
    """
    if not section.recalls:
        return []
    recalls = sorted({*section.recalls, config.landmarks.recall})
    if own or section.design == "full":
        return [(recall, section.repeats) for recall in recalls]
    return [(config.landmarks.recall, 1)]


def embedding_units(job: Job, kind: EmbeddingKind, chosen: Chosen | None) -> list[Unit]:
    """Units of some rows (None: all), and what the cache holds of them elsewhere."""
    digest = embedding_fingerprint(job.fingerprints["embedding"], job.config, kind).hex
    rows = job.config.replicas.rows_per_shard
    if chosen is None:
        units = range_units("embedding", digest, job.files, rows)
    else:
        listed = list_shards(job.cache, "embedding", digest)
        units = []
        for file, members in chosen:
            plan = sparse_units("embedding", digest, file, members, rows)
            units += reuse_rows(job.cache, plan, listed, rows, job.held_rows).units
    return [replace(unit, embedding=kind) for unit in units]


def _timed_embedding(job: Job, units: Sequence[Unit]) -> float | None:
    """Compute what is missing; the model's seconds for a row, None if the cache held all."""
    stages = job.log.manifest.stages
    before = stages.get("embedding")
    seconds, rows = (before.model_seconds, before.load.rows) if before is not None else (0.0, 0)
    run_units(job, units)
    after = stages["embedding"]
    computed = after.load.rows - rows
    return (after.model_seconds - seconds) / computed if computed else None


def _row_seconds(job: Job, stage: str) -> float | None:
    """The model's seconds for a row of a stage, None if the cache held all."""
    record = job.log.manifest.stages[stage]
    return record.model_seconds / record.load.rows if record.load.rows else None


EVALUATION = Evaluation(settings, inputs, FidelityReduce, run, table, plots)
