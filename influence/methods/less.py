"""Method LESS (Xia et al., arXiv 2402.04333): AdamW's updates along a warm-up's checkpoints.

With theta_j the model after epoch j of a warm-up, lr_j the mean learning rate of that epoch's steps
and Pi a random projection, the score of a candidate z for a sub-task T is

    sum over j of lr_j mean over z' in T of cos(Pi Gamma(z; theta_j), Pi grad l(z'; theta_j)),

and its score the largest one of all sub-tasks (section 3.3 and section 4). Gamma is what AdamW
would step by with z's gradient alone, from the moments that it had at theta_j (section 3.2); the
targets' gradients are plain. A sub-task is a group of a target, or a target without groups.

What differs from the paper and its code. The paper's formula divides by the length of a sub-task's
mean gradient, its code takes the mean of the rows' cosines; so does this. The code leaves Adam's
bias corrections out and puts eps below the root; here Gamma is what torch's AdamW steps by, as in
the paper. lr_j are divided by their sum, as in the code, which changes no ranking. The projection
is a randomised Hadamard transform of every layer by itself instead of one Rademacher matrix (which
gradients.projection: rademacher gives).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from influence.checkpoint_units import (
    GRADIENTS,
    checkpoint_records,
    checkpoint_units,
    rate_weights,
)
from influence.config_checks import of_others
from influence.cost import SHARD_BYTES, check_vector_bytes
from influence.errors import InputError
from influence.job import Job, run_units, timed
from influence.methods.kind import Method
from influence.missing_work import PREDICTOR_BYTES
from influence.optimizer_use import TARGET_GRADIENTS
from influence.score_map import map_scores

if TYPE_CHECKING:
    from influence.config import Config
    from influence.model_shape import ModelShape
    from influence.planned_work import Planner

_PROJECTIONS = ("srht", "rademacher", "countsketch", "kronecker", "none")


def run(job: Job, reduce: Any) -> None:
    """Updates and gradients at every checkpoint, their products, and the weighted sums."""
    shape = job.model_shape
    check_vector_bytes(job.config, shape)
    check_bytes(job.config, shape, reduce.column_count())
    records = checkpoint_records(job.config)
    weights = rate_weights(records)
    for record, weight in zip(records, weights, strict=True):
        job.progress.note(
            f"{record.folder}: after step {record.step:,}, mean learning rate "
            f"{record.learning_rate:.3g}, weight {weight:.1%}"
        )
    checkpoints = checkpoint_units(job)
    run_units(job, [unit for each in checkpoints for unit in each.units.all])
    scores = []
    for each in checkpoints:
        with timed(job, "scores", quiet=True):
            predictor = reduce.fit_checkpoint(each.units)
        scores.append(map_scores(job, each.units.sketches, predictor))
    with timed(job, "scores", quiet=True):
        reduce.take_checkpoints(scores, weights)


def plan(planner: Planner) -> None:
    """The gradients' stage as often as there are checkpoints, and a map to scores for each."""
    checkpoints = checkpoint_units(planner.job)
    candidates = [unit for each in checkpoints for unit in each.units.sketches]
    targets = [u for each in checkpoints for us in each.units.targets.values() for u in us]
    planner.add(planner.missing.stage(TARGET_GRADIENTS, targets))
    gradients = planner.missing.stage(GRADIENTS, candidates)
    planner.add(gradients)
    planner.work.notes.append(
        f"{GRADIENTS}: of every candidate at each of {len(checkpoints)} checkpoints of the warm-up"
    )
    width = _width(planner.job.config, planner.missing.shape)
    planner.scores(gradients, candidates, width, planner.columns)
    scores = planner.work.stages["scores"]
    # One predictor is counted there; every checkpoint has its own.
    further, numbers = len(checkpoints) - 1, planner.columns * (width + planner.columns)
    written = further * (8 * numbers + PREDICTOR_BYTES)
    least = replace(
        scores.least,
        objects=scores.least.objects + further,
        read=scores.least.read + planner.missing.replicas * written,
        written=(scores.least.written or 0) + written,
    )
    planner.add(replace(scores, least=least))
    planner.selection(0)


def check_bytes(config: Config, shape: ModelShape, columns: int) -> None:
    """Refuse more target columns than a replica can hold, in float64, and write at once.

    Raises:
        InputError: states the bytes that are needed and those that there are.
    """
    needed = 8 * columns * _width(config, shape)
    if needed > SHARD_BYTES:
        raise InputError(
            f"method: less multiplies rows with {columns:,} target columns x "
            f"{_width(config, shape):,} numbers x 8 bytes = {needed:,} bytes in every replica; "
            f"expected at most {SHARD_BYTES:,}: use targets.NAME.per: group, or a projection"
        )


def _width(config: Config, shape: ModelShape) -> int:
    """Numbers that are kept of a row."""
    return shape.attributed if config.gradients.projection == "none" else config.gradients.dim


def check(config: Config) -> str | None:
    """What does not go with this method."""
    warmup, gradients = config.warmup, config.gradients
    if config.weights.order == 2:
        return None  # it is refused for every method of first order alone
    if warmup is None:
        return (
            "warmup: null (or warmup.fraction: 0), and method: less takes gradients at the "
            "checkpoints of a warm-up, with AdamW's moments there; leave the section out for its "
            "defaults"
        )
    if not warmup.keep_epochs:
        return (
            "warmup.keep_epochs: false, and method: less takes gradients after each epoch; "
            "expected true (with warmup.epochs: 1 for a single checkpoint)"
        )
    if gradients.parameters in ("all", "linear"):
        return (
            f"gradients.parameters: {gradients.parameters!r}, and method: less has AdamW's moments "
            "of the warm-up's LoRA factors alone; expected lora, or patterns of their names"
        )
    if gradients.projection not in _PROJECTIONS:
        return (
            f"gradients.projection: {gradients.projection!r}, and method: less projects the sum of "
            f"all layers of AdamW's update; expected one of {', '.join(_PROJECTIONS)}"
        )
    if not gradients.normalize or gradients.norms != "projected":
        key = "normalize: false" if not gradients.normalize else f"norms: {gradients.norms}"
        return (
            f"gradients.{key}, and method: less takes cosines of what it keeps; expected "
            "normalize: true and norms: projected"
        )
    return of_others(config)


METHOD = Method(
    title="LESS",
    run=run,
    plan=plan,
    needs_gradients=True,
    at_checkpoints=True,
    gradient_defaults={"parameters": "lora", "projection": "srht"},
    section_defaults={
        "warmup": {"epochs": 4.0, "keep_epochs": True},
        "selection": {"combine": "max"},
    },
    target_defaults={"per": "group"},
    check=check,
    check_bytes=check_bytes,
)
