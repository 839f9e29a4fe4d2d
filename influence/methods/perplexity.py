"""Method perplexity: by the model's own loss on a candidate's response; no target is asked.

Mid-perplexity (rows whose perplexity is about the pool's median) and top-perplexity (the highest)
are the baselines of Yin and Rush, arXiv 2410.16208, and of Ivison et al., arXiv 2503.01807.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from influence import cost
from influence.batching import Batch
from influence.config import Config
from influence.fingerprints import model_values
from influence.load import Load
from influence.loss import response_forward, sample_losses
from influence.model_shape import ModelShape
from influence.row_method import row_method
from influence.row_scores import PoolRows
from influence.row_stages import Rows, RowStage, number_layout, number_of_each, on_model
from influence.stages import Toolbox, Vectors


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
        logits, labels, row = response_forward(tools.replica.model, batch)
        return sample_losses(logits, labels, row, len(batch.lengths), "mean").cpu().numpy()

    return number_of_each(tools, rows, compute)


def _flops(config: Config, shape: ModelShape | None, load: Load) -> float:
    """A forward pass, and logits at response positions (half of what `head` counts both ways)."""
    assert shape is not None  # the method runs a model
    return cost.forward(shape, load) + cost.head(shape, load) / 2


METHOD = row_method(
    "perplexity",
    "Perplexity",
    score,
    stage=RowStage(
        name="losses",
        values=model_values,
        load=on_model(losses),
        flops=_flops,
        layout=number_layout,
    ),
    runs_model=True,
    no_score="loss is not finite",
)
