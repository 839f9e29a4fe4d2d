"""Evaluation `lds`: the linear datamodeling score of methods (`influence.datamodeling`).

The model is fine-tuned on random subsets of a small pool; a method is good where the sums of its
scores rank the subsets as their test losses do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel

from influence.config import Config
from influence.datamodeling import (
    Agreement,
    datamodeling_score,
    draw_subsets,
    filled,
    reliability,
)
from influence.errors import InputError
from influence.evaluations.kind import Evaluation, ResultTable, Trainings
from influence.evaluations.small_pool import (
    SmallPoolReduce,
    draw_pool,
    method_scores,
    own_settings,
    read_tests,
    row_label,
    rows_drawn,
    rows_of,
    section_of,
    trained_losses,
)
from influence.job import Job, timed
from influence.report_format import decimal
from influence.retraining import Tested, training_seeds

NAME = "lds"


class Score(BaseModel):
    """A linear datamodeling score and its 95 % interval; None where scores or losses are constant.

    rows: that it is a mean over; 1 where it is of the mean of all.
    """

    value: float | None
    low: float | None
    high: float | None
    rows: int = 1

    @classmethod
    def of(cls, found: Agreement, rows: int = 1) -> Score:
        """With the rows that it is a mean over."""
        return cls(value=found.value, low=found.low, high=found.high, rows=rows)


class MethodScore(BaseModel):
    """One method and target. lds: of the target's score and the mean test loss. by_row: the mean
    over the target's rows, each with its own score and loss; None where there are none. unscored:
    rows of the pool without a score, which count with the mean."""

    lds: Score
    by_row: Score | None
    unscored: int


class Truth(BaseModel):
    """The test losses that the subsets' models have: their mean and standard deviation over the
    subsets, in nats per token, each the mean over the seeds; and how well these rank
    (`influence.datamodeling.reliability`)."""

    mean: float
    sd: float
    reliability: float | None
    rows: int
    rows_without_loss: int


class About(BaseModel):
    """rows: of the small pool."""

    rows: int
    subsets: int
    rows_each: int
    seeds: list[int]
    model: str
    adapter: str | None


class Lds(BaseModel):
    """The document of evaluation.json: by method and target, and by target."""

    methods: dict[str, dict[str, MethodScore]]
    truth: dict[str, Truth]
    about: About


def settings(config: Config) -> Config:
    """The small pool's own run; see `own_settings`.

    Raises:
        InputError: a method's changes that do not make a config.
    """
    section = section_of(config, NAME)
    per_row = section.per_row and section.tests is None
    return own_settings(config, NAME, f"{section.fraction:.6%}", per_row=per_row)


def inputs(config: Config) -> dict[str, Tested]:
    """The tests' files.

    Raises:
        InputError: files that are not there.
    """
    return read_tests(config, NAME)


def run(job: Job, reduce: Any, tests: dict[str, Tested]) -> dict[str, Any]:
    """Scores of all methods, trainings on all subsets, and how the two go together.

    Raises:
        InputError: too few rows, or of a method's run.
        ShardsFailedError: some units failed for good; everything else is committed.
    """
    config, section = job.config, section_of(job.config, NAME)
    pool = draw_pool(job, reduce, NAME)
    subsets = draw_subsets(len(pool), section.subsets, section.fraction, config.seed)
    if subsets.all():
        raise InputError(
            f"evaluation.lds.fraction: {section.fraction:g} of {len(pool)} rows are all of them; "
            f"expected {(len(pool) - 1) / len(pool):.4g} at most, for subsets to differ"
        )
    scores = method_scores(job, NAME, len(pool))
    seeds = training_seeds(config, section.seeds)
    parts = [(pool[subset], None, f"lds: subset {i}") for i, subset in enumerate(subsets)]
    losses = trained_losses(job, reduce, parts, seeds, tests)
    with timed(job, "comparing", quiet=True):
        found = {
            method: {
                target: judged(target, named, subsets, losses[target].mean(axis=0), config.seed)
                for target in losses
            }
            for method, named in scores.items()
        }
    about = About(
        rows=len(pool),
        subsets=len(subsets),
        rows_each=int(subsets[0].sum()),
        seeds=seeds,
        model=config.model.name,
        adapter=config.finetune.adapter,
    )
    truth = {name: truth_of(values) for name, values in losses.items()}
    return Lds(methods=found, truth=truth, about=about).model_dump(mode="json")


def judged(
    target: str,
    scores: Mapping[str, Float[np.ndarray, " n"]],
    subsets: Bool[np.ndarray, "s n"],
    losses: Float[np.ndarray, "s t"],
    seed: int,
) -> MethodScore:
    """A method's figures for one target, from its scores by target and group."""
    whole, unscored = filled(scores[target][:, None])
    rows = np.flatnonzero(np.isfinite(losses).all(axis=0))
    mean = losses[:, rows].mean(axis=1, keepdims=True)
    lds = Score.of(datamodeling_score(whole, subsets, mean, seed=seed))
    labels = {int(row): f"{rows_of(target)}/{row_label(int(row))}" for row in rows}
    own = [row for row, label in labels.items() if label in scores]
    by_row = None
    if own:
        columns, _ = filled(np.stack([scores[labels[row]] for row in own], axis=1))
        found = datamodeling_score(columns, subsets, losses[:, own], seed=seed)
        by_row = Score.of(found, len(own))
    return MethodScore(lds=lds, by_row=by_row, unscored=unscored)


def truth_of(losses: Float[np.ndarray, "seeds s t"]) -> Truth:
    """What the trainings on the subsets came to."""
    usable = np.isfinite(losses).all(axis=(0, 1))
    by_seed = losses[:, :, usable].mean(axis=2)
    means = by_seed.mean(axis=0)
    return Truth(
        mean=float(means.mean()),
        sd=float(means.std(ddof=1)),
        reliability=reliability(by_seed),
        rows=int(usable.sum()),
        rows_without_loss=int((~usable).sum()),
    )


def table(document: dict[str, Any]) -> ResultTable:
    """A line for each target and method."""
    found = Lds.model_validate(document)
    about, rows = found.about, []
    for target in found.truth:
        for method, by_target in found.methods.items():
            each = by_target[target]
            rows.append((f"{target}: {method}", *_shown(each.lds), *_shown(each.by_row)))
    caption = (
        f"The model was fine-tuned on {about.subsets:,} random subsets of {about.rows_each:,} of "
        f"{about.rows:,} candidates, with {_seeds(len(about.seeds))} each. LDS: Spearman, over "
        "the subsets, of the sum of the subset's scores and minus the mean test loss; 1 is "
        "perfect, 0 is chance. By row: the same for each target row by its own scores and loss, "
        "mean over the rows. Intervals: 95 %, bootstrap over the subsets."
    )
    for target, truth in found.truth.items():
        caption += f" {target}: test loss {truth.mean:.4f}, standard deviation over the subsets "
        caption += f"{truth.sd:.4f}"
        if truth.reliability is not None:
            caption += f", reliability over seeds {truth.reliability:.2f}"
        caption += "."
        if truth.rows_without_loss:
            caption += f" {truth.rows_without_loss:,} of its test rows have no loss."
    unscored = {m: max(t.unscored for t in by.values()) for m, by in found.methods.items()}
    for method, count in unscored.items():
        if count:
            caption += f" {method}: {count:,} rows without a score count with the mean score."
    headings = ("Target and method", "LDS", "95 %", "LDS by row", "95 %")
    return ResultTable("Linear datamodeling score", caption, headings, rows)


def _shown(score: Score | None) -> Sequence[str]:
    if score is None or score.value is None:
        return ("–", "–")
    if score.low is None:
        return (decimal(score.value), "–")
    return (decimal(score.value), f"{decimal(score.low)} to {decimal(score.high)}")


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def trainings(config: Config, counts: Mapping[str, Any]) -> list[Trainings]:
    """By the evaluation's own config: every subset with every seed."""
    section = section_of(config, NAME)
    rows = section.fraction * rows_drawn(config, NAME, counts)
    return [Trainings(section.subsets * section.seeds, rows)]


EVALUATION = Evaluation(
    settings, inputs, SmallPoolReduce, run, table, trainings=trainings, as_written=True
)
