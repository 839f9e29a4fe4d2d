"""Method semantic: cosines of candidates' and target rows' sentence embeddings; no model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from influence.config import Config
from influence.job import Job
from influence.load import Load
from influence.methods.kind import Method
from influence.model_shape import ModelShape
from influence.pool_units import row_units, target_row_units
from influence.row_stages import Loaded, Rows, RowStage
from influence.schemas import VectorLayout
from influence.sentence_encoder import (
    SentenceEncoder,
    encoder_content,
    encoder_flops,
    encoder_width,
    find_encoder,
    text_of,
)
from influence.stages import Toolbox, Vectors
from influence.target_cosines import plan_cosines, run_cosines

if TYPE_CHECKING:
    from influence.planned_work import Planner

STAGE = "sentences"
KEY = "semantic.encoder"


def sentences(encoder: SentenceEncoder, rows: Rows) -> Vectors:
    """Unit embeddings (float32) of the rows' texts."""
    positions = rows.scorable
    found = encoder.encode([text_of(rows.examples[i].messages) for i in positions])
    count = len(positions)
    norms = np.linalg.norm(found.astype(np.float64), axis=1)
    return Vectors(np.asarray(positions), found, norms, np.full(count, np.nan))


def _load(config: Config, tools: Callable[[], Toolbox], device: Callable[[], str]) -> Loaded:
    encoder = SentenceEncoder(config.semantic.encoder, key=KEY, device=device())
    return Loaded(lambda rows: sentences(encoder, rows), encoder.device_name)


def _values(config: Config) -> dict[str, Any]:
    return {"encoder": encoder_content(config.semantic.encoder, KEY), "text": "turns, by lines"}


def _flops(config: Config, shape: ModelShape | None, load: Load) -> float:
    return encoder_flops(config.semantic.encoder, KEY, load.tokens)


def _layout(config: Config, shape: ModelShape | None) -> VectorLayout:
    return VectorLayout(dtype="float32", dim=encoder_width(config.semantic.encoder, KEY))


def run(job: Job, reduce: Any) -> None:
    """Embeddings of all texts, and the cosines with the targets' mean embeddings."""
    run_cosines(job, reduce, row_units(job, STAGE), target_row_units(job, STAGE))


def plan(planner: Planner) -> None:
    """Embeddings, and a map from them to scores."""
    job = planner.job
    width = encoder_width(job.config.semantic.encoder, KEY)
    plan_cosines(planner, STAGE, row_units(job, STAGE), target_row_units(job, STAGE), width)


METHOD = Method(
    title="Semantic similarity",
    run=run,
    plan=plan,
    runs_model=False,
    check_files=lambda config: find_encoder(config.semantic.encoder, KEY),
    stages=(
        RowStage(
            name=STAGE,
            values=_values,
            load=_load,
            flops=_flops,
            layout=_layout,
            reads_texts=True,
        ),
    ),
)
