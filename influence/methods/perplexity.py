"""Method perplexity: by the model's own loss on a candidate's response; no target is asked.

Mid-perplexity (rows whose perplexity is about the pool's median) and top-perplexity (the highest)
are the baselines of Yin and Rush, arXiv 2410.16208, and of Ivison et al., arXiv 2503.01807.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from influence import cost
from influence.batching import Batch
from influence.config import Config
from influence.fingerprints import model_values
from influence.job import Job, run_units, timed
from influence.load import Load
from influence.loss import response_forward, sample_losses
from influence.memory import computed
from influence.methods.kind import Method
from influence.model_shape import ModelShape
from influence.pool_units import row_units
from influence.quantities import Quantities, StageWork, driver_seconds
from influence.row_scores import PoolRows
from influence.row_stages import Loaded, Rows, RowStage
from influence.schemas import VectorLayout
from influence.stages import Toolbox, Vectors

if TYPE_CHECKING:
    from influence.planned_work import Planner

STAGE = "losses"


def mid_scores(loss: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """-|loss - median|, the median of the finite losses: 0 for a row in the middle of the pool."""
    finite = np.isfinite(loss)
    if not finite.any():
        return np.full(len(loss), np.nan)
    return -np.abs(loss - np.median(loss[finite]))


def score(rows: PoolRows) -> Float[np.ndarray, " n"]:
    """By the mean loss in nats, the logarithm of the perplexity; duplicates do not count."""
    loss = np.where(rows.pool.scorable, rows.numbers("loss"), np.nan)
    return mid_scores(loss) if rows.config.perplexity.rank == "mid" else loss


def losses(tools: Toolbox, rows: Rows) -> Vectors:
    """Mean loss (nats) of every row's response tokens, from one forward pass."""

    def compute(batch: Batch) -> np.ndarray:
        moved = batch.to(tools.replica.device)
        with torch.no_grad():
            logits, labels, index = response_forward(tools.replica.model, moved)
            found = sample_losses(logits, labels, index, len(moved.lengths), "mean")
        return found.double().cpu().numpy()

    parts, positions = [], []
    for batch, found in computed(rows.batches, tools.limit, compute):
        parts.append(found)
        positions += batch.positions
    loss = np.concatenate(parts)
    column = loss[:, None].astype(np.float32)
    return Vectors(np.asarray(positions), column, np.full(len(loss), np.nan), loss)


def _load(config: Config, tools: Callable[[], Toolbox], device: Callable[[], str]) -> Loaded:
    box = tools()

    def notes() -> tuple[str, ...]:
        return (*box.replica.notes, *([box.limit.note] if box.limit.note else []))

    return Loaded(partial(losses, box), box.replica.device_name, notes)


def _flops(config: Config, shape: ModelShape | None, load: Load) -> float:
    """A forward pass, and logits at response positions (half of what `head` counts both ways)."""
    assert shape is not None  # the method runs a model
    return cost.forward(shape, load) + cost.head(shape, load) / 2


def run(job: Job, reduce: Any) -> None:
    """Losses of all candidates, and their order."""
    units = row_units(job, STAGE)
    run_units(job, units)
    with timed(job, "scores"):
        reduce.score_rows("perplexity", units)


def plan(planner: Planner) -> None:
    """The losses, which the driver then reads."""
    stage = planner.missing.stage(STAGE, row_units(planner.job, STAGE))
    planner.add(stage)
    effort = driver_seconds(1, 0.0, float(planner.counts["rows"]))
    planner.add(StageWork("scores", Quantities(read=stage.whole, effort=effort), replicas=False))
    planner.selection(0)


METHOD = Method(
    title="Perplexity",
    run=run,
    plan=plan,
    score=score,
    no_score="loss is not finite",
    stages=(
        RowStage(
            name=STAGE,
            values=model_values,
            load=_load,
            flops=_flops,
            layout=lambda _config, _shape: VectorLayout(dtype="float32", dim=1),
        ),
    ),
)
