"""Evaluation `reductions`: the ways to turn token gradients into a row's, compared.

For each way the rank correlation of scores and response lengths, which is the way's length bias,
and how far its ranking is that of `mean`. The gradients of `sum` and `sqrt` are those of `mean`
times a power of a row's response tokens, and unit gradients are those over their norm: all of them
come from the same shards, with a curvature of their own. `token_max` needs whole gradients and the
model once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel

from influence.cache import Cache
from influence.config import Config
from influence.curvature_units import STAGE
from influence.errors import InputError
from influence.evaluations.kind import Evaluation, ResultTable
from influence.evaluations.own_run import OwnReduce, all_gradients, own_config
from influence.fidelity import true_fidelity
from influence.in2core import map_sums
from influence.in2core_reduce import InfluenceReduce
from influence.job import Job, timed
from influence.report_format import decimal, percent
from influence.score_map import map_scores, map_units
from influence.score_shards import ShardTable, scoring_url
from influence.token_units import token_units
from influence.units import ExactUnits, Unit

NAME = "reductions"
#: Way -> (unit, exponent of the response tokens).
WAYS = {"mean": (False, 0.0), "sum": (False, 1.0), "sqrt": (False, 0.5), "unit": (True, 0.0)}
TOKEN_MAX = "token_max"
LABELS = {
    "mean": "mean of the tokens",
    "sum": "sum",
    "sqrt": "sum over the root of their number",
    "unit": "mean, brought to length 1",
    TOKEN_MAX: "strongest token",
}
#: Of the ranked rows, those whose overlap with the head of the ranking by `mean` is taken.
HEAD = 0.05


class Way(BaseModel):
    """By target or group; None where scores or lengths are constant.

    length_spearman: of scores and response lengths. spearman: with the scores by `mean`. overlap:
    the part of the best 5 % by `mean` that is among the best 5 % here.
    """

    length_spearman: dict[str, float | None]
    spearman: dict[str, float | None]
    overlap: dict[str, float]


class About(BaseModel):
    """candidates: rows that every way has a score for."""

    candidates: int
    targets: list[str]
    model: str
    adapter: str | None


class Reductions(BaseModel):
    """The document of evaluation.json; `token_max` is None with projected gradients."""

    mean: Way
    sum: Way
    sqrt: Way
    unit: Way
    token_max: Way | None
    about: About


class ReductionsReduce(OwnReduce):
    """DataInf once for each way; memory for a few numbers of every row."""

    def begin_way(self, way: str, exact: ExactUnits) -> list[Unit]:
        """As `Reducer.begin_influence`."""
        own, (unit, exponent) = self.reducer, WAYS[way]
        assert own.pool is not None
        self._influence = InfluenceReduce(
            own.cache,
            self._url,
            own.pool,
            own.targets,
            own.columns,
            unit=unit,
            exponent=exponent,
        )
        return self._influence.begin(exact)

    def fit_way(self, sums: Sequence[Unit]) -> str:
        """As `Reducer.fit_influence`; the scores are yet to be multiplied with the rows' tokens."""
        return self._influence.predictor(sums)

    def compare(self, scores: Mapping[str, Sequence[Unit]]) -> dict[str, Any]:
        """What the document holds of every way, and the rows that are compared.

        Raises:
            InputError: fewer than 4 rows have a score.
        """
        pool, names = self.reducer.pool, self.reducer.columns.names
        assert pool is not None
        lengths = pool.n_response_tokens.astype(np.float64)
        found = {}
        for way, units in scores.items():
            exponent = WAYS.get(way, (False, 0.0))[1]
            found[way] = self._named(units) * lengths[:, None] ** exponent
        ranked = np.logical_and.reduce([np.isfinite(P).all(axis=1) for P in found.values()])
        rows = int(ranked.sum())
        if rows < 4:
            raise InputError(f"evaluation.{NAME}: {rows} rows have a score; expected 4 at least")
        mean, head = found["mean"][ranked], max(1, round(HEAD * rows))
        ways = {}
        for way, P in found.items():
            values = dict(zip(names, P[ranked].T, strict=True))
            of_mean = dict(zip(names, mean.T, strict=True))
            alike = {name: true_fidelity(values[name], of_mean[name], head) for name in names}
            ways[way] = Way(
                length_spearman={
                    name: true_fidelity(values[name], lengths[ranked], 1).spearman for name in names
                },
                spearman={name: each.spearman for name, each in alike.items()},
                overlap={name: each.recall for name, each in alike.items()},
            )
        return {"ways": ways, "rows": rows}

    @property
    def _url(self) -> str:
        return scoring_url(self.reducer.config.run)

    def _named(self, units: Sequence[Unit]) -> Float[np.ndarray, "n names"]:
        """Scores for every name; NaN for a row without."""
        pool, columns = self.reducer.pool, self.reducer.columns
        assert pool is not None
        table = ShardTable(Cache(self._url), units, pool, pool.scorable, len(columns.columns))
        found = np.full((len(pool), len(columns.names)), np.nan)
        for block in table.blocks():
            found[block.positions] = block.P @ columns.named()
        return found


def settings(config: Config) -> Config:
    """In2Core's own settings with the gradients of `mean`, of which the others are made.

    Raises:
        InputError: gradients that In2Core has no use for.
    """
    return own_config(config, NAME, gradients={"reduction": "mean", "normalize": False})


def inputs(_: Config) -> None:
    """Nothing beside the rows' text."""


def run(job: Job, reduce: Any, _: None) -> dict[str, Any]:
    """DataInf by every way, and the rankings held against each other.

    Raises:
        InputError: too few rows.
    """
    units = all_gradients(job, reduce)
    scores: dict[str, list[Unit]] = {}
    for way in WAYS:
        with timed(job, STAGE, quiet=True):
            sums = reduce.begin_way(way, units)
        map_sums(job, sums)
        with timed(job, STAGE, quiet=True):
            predictor = reduce.fit_way(sums)
        scores[way] = map_scores(job, units.sketches, predictor)
        if way == "mean" and job.config.gradients.projection == "none":
            scores[TOKEN_MAX] = token_units(units.sketches, predictor)
            map_units(job, scores[TOKEN_MAX], [predictor])
    with timed(job, "comparing", quiet=True):
        found = reduce.compare(scores)
    about = About(
        candidates=found["rows"],
        targets=list(job.config.targets),
        model=job.config.model.name,
        adapter=job.config.model.adapter,
    )
    ways = {TOKEN_MAX: None, **found["ways"]}
    return Reductions(**ways, about=about).model_dump(mode="json")


def table(document: dict[str, Any]) -> ResultTable:
    """A line for each way and target."""
    found = Reductions.model_validate(document)
    rows = []
    for name in found.about.targets:
        for way, label in LABELS.items():
            each: Way | None = getattr(found, way)
            if each is None:
                continue
            figures = (decimal(each.length_spearman[name]), decimal(each.spearman[name]))
            rows.append((f"{name}: {label}", *figures, percent(each.overlap[name], 0)))
    caption = (
        f"DataInf's scores of {found.about.candidates:,} candidates, by how token gradients become "
        "a row's. Length bias: Spearman of scores and response lengths; above 0, long responses "
        "rank first."
    )
    if found.token_max is None:
        caption += " The strongest token needs gradients.projection: none."
    headings = ("Token gradients", "Length bias", "Spearman with the mean", "Best 5% in common")
    return ResultTable("Reductions", caption, headings, rows)


EVALUATION = Evaluation(settings, inputs, ReductionsReduce, run, table)
