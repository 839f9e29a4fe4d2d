"""Evaluation `exact_inverse`: how far DataInf is from the inverse that it stands for.

On a random part of the pool, whose gradients fit into memory: layer by layer DataInf's average of
inverses against (G'G/n + damping I)^-1 with the same damping, and the rankings by the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from influence.config import Config
from influence.errors import InputError
from influence.evaluations.kind import Evaluation, ResultTable
from influence.evaluations.own_run import OwnReduce, load_catalogue, own_config, run_gradients
from influence.exact_work import exact_units
from influence.gradient_rows import mean_gradients
from influence.in2core import check_query_bytes
from influence.inverse_distance import inverse_distance
from influence.job import Job, timed
from influence.layer_choice import pilot_rows
from influence.model_shape import model_shape
from influence.report_format import decimal, percent, significant
from influence.units import ExactUnits

NAME = "exact_inverse"


class Layer(BaseModel):
    """Means over the targets' columns; see `influence.inverse_distance.LayerDistance`."""

    name: str
    relative: float
    cosine: float


class About(BaseModel):
    """rows: of the pool, whose gradients were taken. numbers: of a row's stored gradient."""

    rows: int
    columns: int
    numbers: int
    model: str
    adapter: str | None


class ExactInverse(BaseModel):
    """The document of evaluation.json.

    spearman: of the rows' influences by the two, mean over the targets' columns; None where all are
    constant. scale: how many times as large DataInf's are. layers: in the model's order.
    """

    spearman: float | None
    scale: float
    layers: list[Layer]
    about: About


class ExactInverseReduce(OwnReduce):
    """The measurement in the reducer; memory for the gradients of the part."""

    def measure(self, exact: ExactUnits) -> dict[str, Any]:
        """Figures of the document.

        Raises:
            InputError: not one row, or a row of a target, has no usable gradient.
        """
        own = self.reducer
        assert own.pool is not None
        unit = own.config.gradients.normalize
        parts = list(pilot_rows(own.cache, exact, own.pool, unit=unit))
        if not parts:
            raise InputError(
                f"evaluation.{NAME}.rows: not one of them has a usable gradient; reasons: "
                f"{own.pool.reasons()}"
            )
        blocks = parts[0][0]
        gradients, norms = (torch.from_numpy(np.concatenate([p[i] for p in parts])) for i in (1, 2))
        targets = mean_gradients(own.cache, exact.targets, own.targets, own.columns, unit=unit)
        found = inverse_distance(
            gradients, norms, torch.from_numpy(targets).to(gradients.dtype), blocks
        )
        return {
            "spearman": found.spearman,
            "scale": found.scale,
            "layers": [Layer(**layer._asdict()) for layer in found.layers],
            "rows": len(gradients),
            "numbers": gradients.shape[1],
        }


def settings(config: Config) -> Config:
    """In2Core's own settings; the part is drawn as the pilot of `layers: auto` is.

    Raises:
        InputError: gradients that In2Core has no use for.
    """
    section = config.evaluation.exact_inverse
    assert section is not None
    return own_config(config, NAME, layer_economy={"pilot": section.rows})


def inputs(_: Config) -> None:
    """Nothing beside the rows' text."""


def run(job: Job, reduce: Any, _: None) -> dict[str, Any]:
    """Gradients of a part of the pool, and the distance on them.

    Raises:
        InputError: more target columns than fit, or gradients that are missing.
    """
    load_catalogue(job, reduce)
    job.shape = model_shape(job.config)
    check_query_bytes(job.config, job.shape, reduce.column_count())
    units = exact_units(job, reduce, reduce.choose_pilot())
    run_gradients(job, units)
    with timed(job, "inverses"):
        found = reduce.measure(units)
    about = About(
        rows=found.pop("rows"),
        columns=reduce.column_count(),
        numbers=found.pop("numbers"),
        model=job.config.model.name,
        adapter=job.config.model.adapter,
    )
    return ExactInverse(**found, about=about).model_dump(mode="json")


def table(document: dict[str, Any]) -> ResultTable:
    """All layers together, and the distribution over them."""
    found = ExactInverse.model_validate(document)
    about = found.about
    relative = np.array([layer.relative for layer in found.layers])
    cosine = np.array([layer.cosine for layer in found.layers])
    rows = [
        (what, percent(float(function(relative)), 0), decimal(float(function(cosine))))
        for what, function in (("median", np.median), ("least", np.min), ("most", np.max))
    ]
    caption = (
        f"DataInf's product with its inverse against that with the inverse of the average, on "
        f"{about.rows:,} candidates, {about.columns:,} target columns and {len(found.layers):,} "
        f"layers: the difference as a part of the exact one, and the cosine of the two; over the "
        f"layers. The influences by the two have a Spearman of {decimal(found.spearman, 3)}; "
        f"DataInf's are {significant(found.scale)} times as large."
    )
    return ResultTable(
        "DataInf and the exact inverse", caption, ("Layers", "Off by", "Cosine"), rows
    )


EVALUATION = Evaluation(settings, inputs, ExactInverseReduce, run, table)
