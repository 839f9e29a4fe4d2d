"""Method In2Core: rank by DataInf's influence, with every candidate's own gradient.

San Joaquin et al., arXiv 2408.03560. Three passes over the gradient shards (`influence.datainf`):
the reducer reads their norms, the replicas sum groups of them up, and then score them.
"""

from __future__ import annotations

from typing import Any

from influence.config import Config
from influence.cost import SHARD_BYTES
from influence.curvature_units import STAGE
from influence.errors import InputError
from influence.exact_work import exact_units
from influence.job import Job, run_units, timed
from influence.layer_choice import restricted_fingerprint, write_names
from influence.model_shape import ModelShape
from influence.records import LayerChoice
from influence.score_map import map_scores, map_units
from influence.score_shards import scoring_url
from influence.sentence_encoder import find_encoder
from influence.token_units import token_units
from influence.transfer import check_target
from influence.units import ExactUnits, Unit


def in2core(job: Job, reduce: Any) -> None:
    """Gradients of every row with the reference model, DataInf's passes, scores."""
    units = gradient_units(job, reduce)
    run_units(job, units.all)
    scores = influence_scores(job, reduce, units)
    with timed(job, "scores", quiet=True):
        reduce.take_influences(scores, units.sketches)
    if job.config.coverage.encoder is not None:
        with timed(job, "coverage"):
            reduce.compare_texts()


def check_beside(config: Config) -> None:
    """See that what comes after the scores is there, before anything is computed.

    Raises:
        InputError: names coverage.encoder, transfer.model or transfer.finetune.
    """
    if config.coverage.encoder is not None:
        find_encoder(config.coverage.encoder)
    check_target(config)


def gradient_units(job: Job, reduce: Any) -> ExactUnits:
    """The gradients' units, of candidates and targets; with `layers: auto` these are chosen first.

    Raises:
        InputError: more target columns, or larger gradients, than a replica can hold.
    """
    job.shape = job.model_shape
    check_query_bytes(job.config, job.shape, reduce.column_count())
    if job.config.layers == "auto":
        choose_layers(job, reduce)
    return exact_units(job, reduce, None)


def influence_scores(job: Job, reduce: Any, units: ExactUnits) -> list[Unit]:
    """DataInf's passes over committed gradients; returns the units of the score shards."""
    predictor = solve_influence(job, reduce, units)
    if job.config.gradients.reduction == "token_max":
        scores = token_units(units.sketches, predictor)
        map_units(job, scores, [predictor])
        return scores
    return map_scores(job, units.sketches, predictor)


def solve_influence(job: Job, reduce: Any, units: ExactUnits) -> str:
    """DataInf's first two passes; returns the key of what scores by them."""
    with timed(job, STAGE):
        sums = reduce.begin_influence(units)
    map_sums(job, sums)
    with timed(job, STAGE, quiet=True):
        return reduce.fit_influence(sums)


def map_sums(job: Job, sums: list[Unit]) -> None:
    """Compute what is missing of partial sums over gradient shards."""
    map_units(job, sums, sorted({need for unit in sums for need in unit.needs}))


def choose_layers(job: Job, reduce: Any) -> None:
    """Gradients of all layers of a pilot, and by them the layers that are kept of every row."""
    chosen = job.chosen if job.chosen is not None else reduce.choose_pilot()
    pilot = exact_units(job, reduce, chosen)
    run_units(job, pilot.all)
    with timed(job, "layers"):
        choice = reduce.choose_layers(pilot)
    job.progress.note(choice_text(choice))
    keep_layers(job, choice)
    job.log.manifest.layers = choice
    job.layers_key = write_names(scoring_url(job.config.run), choice.names)
    # The record is that of the rows' own gradients; the pilot's shards are among those planned.
    record = job.log.manifest.stages["gradients"]
    found = job.fingerprints["gradients"]
    record.fingerprint, record.values = found.hex, found.values


def keep_layers(job: Job, choice: LayerChoice) -> None:
    """From here on the job's gradients are those of the layers that were chosen."""
    job.fingerprints["gradients"] = restricted_fingerprint(
        job.fingerprints["gradients"], choice.names
    )


def choice_text(choice: LayerChoice) -> str:
    """A line for the choice."""
    return (
        f"layers: {len(choice.names):,} parameters ({choice.rule}) take "
        f"{choice.row_bytes / choice.full_row_bytes:.1%} of the bytes and rank a pilot of "
        f"{choice.pilot:,} rows with a Spearman of {choice.spearman:.3f} (others: "
        f"{choice.held_out:.3f})"
    )


def vector_width(config: Config, shape: ModelShape) -> int:
    """Numbers that are kept of a row's gradient."""
    most = config.gradients.layer_dim
    if config.gradients.projection == "none":
        return shape.attributed
    return sum(min(size, most) for size in shape.sizes.values())


def check_query_bytes(config: Config, shape: ModelShape, columns: int) -> None:
    """Refuse more columns than a replica can hold H^-1 v of, in float64, and write at once.

    Raises:
        InputError: states the bytes that are needed and those that there are.
    """
    width = vector_width(config, shape)
    needed = 8 * columns * width
    if needed > SHARD_BYTES:
        raise InputError(
            f"method: in2core sums up {columns:,} target columns x {width:,} numbers x 8 bytes = "
            f"{needed:,} bytes in every replica; expected at most {SHARD_BYTES:,}: use "
            "targets.NAME.per: group, gradients.projection: layerwise with a smaller layer_dim, or "
            "fewer layers"
        )
