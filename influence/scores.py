"""The scores of a run, as the reducer holds them between scoring and selecting."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from influence.score_table import ScoreTable


@dataclass(frozen=True)
class Scores:
    """Scores of the whole pool (n rows, m columns); higher is better, NaN has no score.

    Attributes:
        table: every row's scores, exact or predicted.
        exact: rows whose scores are no prediction.
        exact_positions: positions of the rows with exact scores, increasing.
        exact_scores: their scores (r x m).
        loo: leave-one-out predictions for them (r x m), or None if nothing is predicted.
        halves: the two halves of their sketches (2 x r x m), or None if unprojected; where nothing
            is predicted they may be of other rows, a sample.
        loo_halves: leave-one-out predictions of regressions on either half alone, or None.
        calibration: which of the exact rows were drawn uniformly, or None for all.
    """

    table: ScoreTable
    exact: Bool[np.ndarray, "n"]
    exact_positions: Int[np.ndarray, "r"]
    exact_scores: Float[np.ndarray, "r m"]
    loo: Float[np.ndarray, "r m"] | None
    halves: Float[np.ndarray, "2 r m"] | None
    loo_halves: Float[np.ndarray, "2 r m"] | None = None
    calibration: Bool[np.ndarray, "r"] | None = None
