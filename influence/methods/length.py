"""Method length: the longest responses first, the baseline that is hard to beat for its price."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from influence.row_method import row_method
from influence.row_scores import PoolRows


def score(rows: PoolRows) -> Float[np.ndarray, " n"]:
    """The response's tokens that are learnt, after the cut at `data.max_length`."""
    return rows.pool.n_response_tokens.astype(np.float64)


METHOD = row_method("length", "Response length", score)
