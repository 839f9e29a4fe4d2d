"""Method random: a uniform draw, the baseline that every claim is judged against."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from influence import scoring
from influence.row_method import row_method
from influence.row_scores import PoolRows


def score(rows: PoolRows) -> Float[np.ndarray, " n"]:
    """A number in [0, 1) by the seed and a row's messages: equal for equal rows, in any pool."""
    values, eligible = np.full(len(rows.pool), np.nan), rows.pool.eligible
    digests = [rows.pool.digests[position] for position in eligible]
    values[eligible] = scoring.random_scores(rows.config.seed, digests)[:, 0]
    return values


METHOD = row_method("random", "Random selection", score)
