"""Evaluation `leave_one_out`: do scores of single rows say what training without them does?

Rows from the top and the bottom of a method's ranking, and random ones, are left out of the
training on a small pool, one at a time, everything else being the same. The rise of the test loss
by group says whether that method's ends are what they are said to be; every method's scores are
held against the rises of the random rows alone: rows from the ends of one ranking would favour it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel

from influence.config import Config
from influence.datamodeling import (
    agreement,
    changes,
    extremes,
    filled,
    group_sizes,
    left_out_weights,
    mean_rank,
    reliability,
)
from influence.errors import InputError
from influence.evaluations.kind import Evaluation, ResultTable, Trainings
from influence.evaluations.lds import Score
from influence.evaluations.small_pool import (
    SmallPoolReduce,
    draw_pool,
    method_scores,
    own_settings,
    read_tests,
    rows_drawn,
    section_of,
    trained_losses,
)
from influence.job import Job, timed
from influence.report_format import decimal, significant
from influence.retraining import Tested, training_seeds

NAME = "leave_one_out"
GROUPS = ("top", "random", "bottom")


class Rise(BaseModel):
    """Mean rise of the test loss (nats per token) when a row of the group is left out, over its
    rows and the seeds; se: standard error over the rows, None for one."""

    mean: float
    se: float | None
    rows: int


class Truth(BaseModel):
    """By group: random rows, and top and bottom of the method `by`; the full training's mean test
    loss; and how well the random rows' rises rank (`influence.datamodeling.reliability`)."""

    rise: dict[str, Rise]
    full_loss: float
    reliability: float | None


class About(BaseModel):
    """rows: of the pool that is trained on. by: the method whose ranking was asked."""

    rows: int
    left_out: int
    by: str
    seeds: list[int]
    model: str
    adapter: str | None


class LeftOut(BaseModel):
    """A row that was left out: id, group, and the rise of each target's test loss."""

    id: str
    group: str
    rise: dict[str, float]


class LeaveOneOut(BaseModel):
    """The document of evaluation.json; `spearman` by method and target, over the random rows."""

    spearman: dict[str, dict[str, Score]]
    truth: dict[str, Truth]
    rows: list[LeftOut]
    about: About


class LeaveOneOutReduce(SmallPoolReduce):
    """As for the linear datamodeling score, and the rows' ids."""

    def ids_of(self, positions: Int[np.ndarray, " k"]) -> list[str]:
        """After `load_catalogue`."""
        pool = self.reducer.pool
        assert pool is not None
        return [str(pool.ids[int(position)]) for position in positions]


def settings(config: Config) -> Config:
    """The small pool's own run; see `own_settings`.

    Raises:
        InputError: a method's changes that do not make a config, or `by` names none of them.
    """
    section = section_of(config, NAME)
    methods = list(section.methods or {config.method: {}})
    if section.by is not None and section.by not in methods:
        raise InputError(
            f"evaluation.{NAME}.by: {section.by!r} is none of the methods: {', '.join(methods)}"
        )
    return own_settings(config, NAME, "50%")


def inputs(config: Config) -> dict[str, Tested]:
    """The tests' files.

    Raises:
        InputError: files that are not there.
    """
    return read_tests(config, NAME)


def run(job: Job, reduce: Any, tests: dict[str, Tested]) -> dict[str, Any]:
    """Scores of all methods, the full training and those without a row, and how they compare.

    Raises:
        InputError: too few rows, or of a method's run.
        ShardsFailedError: some units failed for good; everything else is committed.
    """
    config, section = job.config, section_of(job.config, NAME)
    pool = draw_pool(job, reduce, NAME)
    scores = method_scores(job, NAME, len(pool))
    by = section.by or next(iter(scores))
    ranked = np.stack([scores[by][target] for target in tests], axis=1)
    groups = extremes(mean_rank(ranked), section.each, section.random, config.seed)
    chosen = np.concatenate([groups[name] for name in GROUPS])
    seeds = training_seeds(config, section.seeds)
    of_group = np.repeat(GROUPS, [len(groups[name]) for name in GROUPS])
    parts: list[tuple[Any, Any, str]] = [(pool, None, "leave_one_out: all rows")]
    for place, name in zip(chosen.tolist(), reduce.ids_of(pool[chosen]), strict=True):
        without = left_out_weights(len(pool), place)
        parts.append((pool, without, f"leave_one_out: without row {name}"))
    losses = trained_losses(job, reduce, parts, seeds, tests)
    with timed(job, "comparing", quiet=True):
        rises = {name: changes(each[:, 1:], each[:, 0]) for name, each in losses.items()}
        spearman = {
            method: {
                target: judged(
                    named[target],
                    groups["random"],
                    rise[:, of_group == "random"].mean(axis=0),
                    config.seed,
                )
                for target, rise in rises.items()
            }
            for method, named in scores.items()
        }
    about = About(
        rows=len(pool),
        left_out=len(chosen),
        by=by,
        seeds=seeds,
        model=config.model.name,
        adapter=config.finetune.adapter,
    )
    left_out = [
        LeftOut(
            id=name,
            group=str(group),
            rise={target: float(rise[:, place].mean()) for target, rise in rises.items()},
        )
        for place, (name, group) in enumerate(
            zip(reduce.ids_of(pool[chosen]), of_group, strict=True)
        )
    ]
    truth = {
        name: truth_of(rise, of_group, float(np.nanmean(losses[name][:, 0])))
        for name, rise in rises.items()
    }
    found = LeaveOneOut(spearman=spearman, truth=truth, rows=left_out, about=about)
    return found.model_dump(mode="json")


def judged(
    scores: Float[np.ndarray, " n"],
    chosen: Int[np.ndarray, " k"],
    rise: Float[np.ndarray, " k"],
    seed: int,
) -> Score:
    """Spearman of scores and rises over some rows; the bootstrap is over them, too."""
    whole, _ = filled(scores[:, None])
    return Score.of(agreement(whole[chosen], rise[:, None], seed=seed), len(chosen))


def truth_of(rise: Float[np.ndarray, "seeds k"], group: np.ndarray, full: float) -> Truth:
    """What leaving rows out does."""
    means = rise.mean(axis=0)
    of_group = {}
    for name in GROUPS:
        own = means[group == name]
        if len(own):
            se = float(own.std(ddof=1) / np.sqrt(len(own))) if len(own) > 1 else None
            of_group[name] = Rise(mean=float(own.mean()), se=se, rows=len(own))
    at_random = rise[:, group == "random"]
    return Truth(rise=of_group, full_loss=full, reliability=reliability(at_random))


def table(document: dict[str, Any]) -> ResultTable:
    """A line for each target and method, and one for each target's rises."""
    found = LeaveOneOut.model_validate(document)
    about, rows = found.about, []
    for target in found.truth:
        for method, by_target in found.spearman.items():
            each = by_target[target]
            shown = "–"
            if each.low is not None:
                shown = f"{decimal(each.low)} to {decimal(each.high)}"
            rows.append((f"{target}: {method}", decimal(each.value), shown))
    caption = (
        f"{about.left_out} of {about.rows:,} candidates were left out of the training one by one "
        f"({len(about.seeds)} seeds): those at the top and at the bottom of {about.by}, and random "
        "ones. Spearman of scores and the rise of the mean test loss over the random ones, and its "
        "95 % interval (bootstrap over them)."
    )
    for target, truth in found.truth.items():
        parts = [
            f"{name} {significant(each.mean)}"
            + ("" if each.se is None else f"±{significant(each.se)}")
            for name, each in truth.rise.items()
        ]
        caption += f" {target}: mean rise of the loss {', '.join(parts)}"
        if truth.reliability is not None:
            caption += f"; reliability over seeds {truth.reliability:.2f}"
        caption += "."
    headings = ("Target and method", "Spearman", "95 %")
    return ResultTable("Leave one out", caption, headings, rows)


def trainings(config: Config, counts: Mapping[str, Any]) -> list[Trainings]:
    """By the evaluation's own config: on all rows, and without each; a row that is left out is
    there with a weight of nothing."""
    section, rows = section_of(config, NAME), rows_drawn(config, NAME, counts)
    ends, at_random = group_sizes(rows, section.each, section.random)
    return [Trainings((1 + 2 * ends + at_random) * section.seeds, rows)]


EVALUATION = Evaluation(
    settings, inputs, LeaveOneOutReduce, run, table, trainings=trainings, as_written=True
)
