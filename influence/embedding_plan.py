"""What a plan counts of `embedding.kind: auto`, and which embeddings a config may come to use."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import reduce as fold

from influence import history
from influence.config import Config
from influence.embedding_choice import (
    PILOT,
    choice_lines,
    kinds_to_choose,
    kinds_to_compare,
    pilot_units,
    recorded_choice,
    take_embedding,
)
from influence.embedding_kind import EmbeddingKind, embedding_fingerprint, named
from influence.exact_price import embedding_flops
from influence.exact_work import Chosen
from influence.fingerprints import Fingerprint
from influence.job import Job
from influence.load import Load
from influence.missing_work import MissingWork
from influence.model_shape import ModelShape, model_shape
from influence.quantities import Quantities, StageWork

# Where no row is known: one of a usual length.
_ROW = Load(rows=1, tokens=256, response_tokens=128, squares=256**2)


def dearest(config: Config, shape: ModelShape, load: Load = _ROW) -> EmbeddingKind:
    """Of the embeddings that `auto` chooses from, the one with the most operations."""
    kinds = kinds_to_choose(config, shape.blocks)
    return max(kinds, key=lambda kind: embedding_flops(config, shape, load, kind))


def considered_embeddings(job: Job) -> list[Fingerprint]:
    """Of every embedding that a run of this job may read or make, beside its config's own."""
    config, whole = job.config, job.fingerprints.get("embedding")
    compared = config.evaluation.fidelity if config.method == "exact" else None
    if whole is None or (config.embedding.kind != "auto" and compared is None):
        return []
    shape = model_shape(config)
    if compared is None:
        kinds = kinds_to_choose(config, shape.blocks)
    else:
        kinds = kinds_to_compare(config, shape)
    return [embedding_fingerprint(whole, config, kind) for kind in kinds]


def plan_embedding(missing: MissingWork, chosen: Chosen) -> tuple[StageWork | None, list[str]]:
    """The pilot's work (None: it is done), and notes.

    `missing` counts with the chosen embedding from here on. Where a run has chosen before, its
    choice counts. Else the dearest embedding does, and in the bill the pilot stands without its
    operations, which are of several kinds.
    """
    job, shape = missing.job, missing.shape
    found = recorded_choice(job.config.cache_url, job.asked or history.decision_digest(job))
    missing.job = replace(job)  # a copy: the run itself is still to choose
    if found is not None:
        take_embedding(missing.job, found)
        said = [line.strip() for line in choice_lines(found)]
        return None, [f"{said[0]}; a pilot on this cache has chosen it", *said[1:]]
    kinds = kinds_to_choose(job.config, shape.blocks)
    pilots = pilot_units(job, kinds, chosen, missing.reduce.choose_pilot())
    stages = []
    for kind, units in zip(kinds, pilots, strict=True):
        of_kind = replace(missing, job=_as_named(job, kind))
        stages.append(of_kind.stage("embedding", units))
    load = missing.reduce.pool_load()
    most = dearest(job.config, shape, load)
    missing.job = _as_named(job, most)
    note = (
        f"embedding: auto: no pilot was run yet; counted with {most.label}, the dearest of "
        f"{len(kinds)}"
    )
    return _together(stages), [note]


def _as_named(job: Job, kind: EmbeddingKind) -> Job:
    print_ = embedding_fingerprint(job.fingerprints["embedding"], job.config, kind)
    prints = {**job.fingerprints, "embedding": print_}
    return replace(job, config=named(job.config, kind), fingerprints=prints)


def _together(stages: list[StageWork]) -> StageWork:
    """One line for all kinds."""
    least = fold(_plus, (stage.least for stage in stages))
    return StageWork(
        PILOT,
        replace(least, flops=None),
        shards=sum(stage.shards for stage in stages),
        cached=sum(stage.cached for stage in stages),
        held=sum(stage.held for stage in stages),
        missing=tuple(key for stage in stages for key in stage.missing),
    )


def _plus(one: Quantities, two: Quantities) -> Quantities:
    values = {
        field.name: (getattr(one, field.name) or 0) + (getattr(two, field.name) or 0)
        for field in fields(Quantities)
    }
    return Quantities(**values)
