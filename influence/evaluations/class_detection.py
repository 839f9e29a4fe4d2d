"""Evaluation `class_detection`: are a target row's most influential candidates of its own class?

For each target row the candidates are ranked by DataInf's influence, by plain inner products of
gradients, by their cosines, and by the cosines of RDS+ embeddings, all from the one reference
model. The units are those of `method: in2core` and `method: rds`, with a column for each row.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel

from influence import storage
from influence.class_detection import MeanError
from influence.config import Config
from influence.curvature_units import STAGE
from influence.evaluations.class_detection_reduce import (
    ClassDetectionReduce,
    Classes,
    Judged,
    read_classes,
)
from influence.evaluations.kind import Evaluation, ResultTable
from influence.evaluations.own_run import load_catalogue, own_config
from influence.fingerprints import model_content
from influence.in2core import gradient_units, influence_scores
from influence.job import Job, run_units, timed
from influence.pipeline import scan_named
from influence.pool_units import embedding_units, rds_target_units
from influence.score_map import map_scores
from influence.score_shards import scoring_url

NAME = "class_detection"
METHODS = {
    "datainf": "DataInf",
    "gradient_product": "gradient products",
    "cosine": "cosine of gradients",
    "rds": "RDS+ embeddings",
}


KINDS = ("auc", "recall", "auc_by_size", "recall_by_size")
HEADS = ("Ranked by", "AUC", "Recall", "AUC by size", "Recall by size")


class Figures(BaseModel):
    """Means over the target rows, and their standard errors.

    The paper's code takes its recall by the size of the influences: `by_size`.
    """

    auc: float
    recall: float
    auc_by_size: float
    recall_by_size: float
    auc_se: float | None
    recall_se: float | None
    auc_by_size_se: float | None
    recall_by_size_se: float | None


class ClassFigures(BaseModel):
    """One class: its candidates, its target rows, and each method's means over those."""

    candidates: int
    target_rows: int
    auc: dict[str, float]
    recall: dict[str, float]


class About(BaseModel):
    """What the figures are of.

    candidates: rows that were ranked. candidates_left_out, target_rows_left_out: by reason.
    influence_seconds: from the gradients in the cache to the influences of all candidates on all
    target rows; None if a part of that was there from an attempt that was cut short.
    """

    column: str
    classes: int
    candidates: int
    target_rows: int
    candidates_left_out: dict[str, int]
    target_rows_left_out: dict[str, int]
    influence_seconds: float | None
    model: str
    model_content: str
    adapter: str | None


class ClassDetection(BaseModel):
    """The document of evaluation.json."""

    datainf: Figures
    gradient_product: Figures
    cosine: Figures
    rds: Figures
    about: About
    by_class: dict[str, ClassFigures]


def settings(config: Config) -> Config:
    """In2Core's own settings, RDS+ embeddings, and every target row for itself.

    Raises:
        InputError: gradients that In2Core has no use for.
    """
    targets = {
        name: {"path": each.path, "limit": each.limit} for name, each in config.targets.items()
    }
    embedding = {"kind": "rds", "dim": config.embedding.dim}
    return own_config(config, NAME, targets=targets, embedding=embedding)


def inputs(config: Config) -> Classes:
    """Every row's class, out of the files.

    Raises:
        InputError: a file without the column, or no class that candidates and targets share.
    """
    assert config.evaluation.class_detection is not None
    files = scan_named("data.candidates", config.data.candidates, config.data.limit)
    targets = {
        name: scan_named(f"targets.{name}.path", [each.path], each.limit)
        for name, each in config.targets.items()
    }
    return read_classes(config.evaluation.class_detection.column, files, targets)


def run(job: Job, reduce: Any, classes: Classes) -> dict[str, Any]:
    """Gradients and embeddings of all rows, four rankings, and how they do.

    Raises:
        InputError: classes that no candidate has, target rows without one, too many target rows.
    """
    load_catalogue(job, reduce, lambda: reduce.take_classes(classes))
    gradients = gradient_units(job, reduce)
    assert job.shape is not None
    job.log.manifest.coverage = job.shape.coverage
    embedding, of_targets = embedding_units(job), rds_target_units(job)
    run_units(
        job,
        [*gradients.all, *(unit for units in of_targets.values() for unit in units), *embedding],
    )
    whole = not storage.list_objects(storage.join(scoring_url(job.config.run), STAGE))
    start = time.monotonic()
    scores = {"datainf": influence_scores(job, reduce, gradients)}
    seconds = time.monotonic() - start
    for name, unit in (("gradient_product", False), ("cosine", True)):
        with timed(job, "regression", quiet=True):
            predictor = reduce.fit_products(gradients, unit)
        scores[name] = map_scores(job, gradients.sketches, predictor)
    with timed(job, "regression", quiet=True):
        predictor = reduce.fit_means(of_targets)
    scores["rds"] = map_scores(job, embedding, predictor)
    with timed(job, "judging"):
        judged = reduce.judge(scores)
    return _document(job.config, judged, seconds if whole else None).model_dump(mode="json")


def _document(config: Config, judged: Judged, seconds: float | None) -> ClassDetection:
    assert config.evaluation.class_detection is not None
    about = About(
        column=config.evaluation.class_detection.column,
        classes=len(judged.by_class),
        candidates=judged.candidates,
        target_rows=judged.target_rows,
        candidates_left_out=judged.candidates_left_out,
        target_rows_left_out=judged.target_rows_left_out,
        influence_seconds=seconds,
        model=config.model.name,
        model_content=model_content(config.model),
        adapter=config.model.adapter,
    )
    figures = {name: _figures(means) for name, means in judged.methods.items()}
    by_class = {name: ClassFigures(**values) for name, values in judged.by_class.items()}
    return ClassDetection(**figures, about=about, by_class=by_class)


def _figures(means: list[MeanError]) -> Figures:
    values: dict[str, float | None] = {}
    for name, each in zip(KINDS, means, strict=True):
        values |= {name: each.mean, f"{name}_se": each.error}
    return Figures.model_validate(values)


def table(document: dict[str, Any]) -> ResultTable:
    """The methods, best first."""
    found = ClassDetection.model_validate(document)
    about = found.about
    figures = {name: getattr(found, name) for name in METHODS}
    rows = [
        (
            METHODS[name],
            _with_error(each.auc, each.auc_se),
            _with_error(each.recall, each.recall_se),
            f"{each.auc_by_size:.3f}",
            f"{each.recall_by_size:.3f}",
        )
        for name, each in sorted(figures.items(), key=lambda item: -item[1].auc)
    ]
    caption = (
        f"Column {about.column}: {about.classes:,} classes, {about.candidates:,} candidates ranked "
        f"for each of {about.target_rows:,} target rows. Means over the target rows and their "
        "standard errors (of those by size in evaluation.json). AUC: how often a candidate of the "
        "row's own class ranks above another; 0.5 is chance. Recall: of as many first ranks as the "
        "class has candidates, the share that is of the class. By size: ranked by the score's size "
        "whatever its sign, as the paper's code does for its recall; a row of the class may pull "
        "the other way."
    )
    if about.influence_seconds is not None:
        caption += (
            f" From the stored gradients to all of DataInf's influences: "
            f"{about.influence_seconds:,.1f} s."
        )
    left = {**about.candidates_left_out, **about.target_rows_left_out}
    if left:
        caption += " Left out: " + ", ".join(f"{n:,} {what}" for what, n in left.items()) + "."
    return ResultTable("Class detection", caption, HEADS, rows)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f}±{error:.3f}"


EVALUATION = Evaluation(settings, inputs, ClassDetectionReduce, run, table)
