"""Scores by a row's strongest token (`gradients.reduction: token_max`), as units of work.

They need the model once more, and directions that follow from all gradients (H^-1 v), so they come
after DataInf's sums and lie beside a run's other scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from influence.batching import Batch, make_batches
from influence.cache import vector_column
from influence.fingerprints import fingerprint
from influence.memory import computed
from influence.predictor import read_predictor
from influence.schemas import VectorLayout, score_shard_schema
from influence.stages import Toolbox
from influence.token_products import max_over_tokens, split_directions, token_products
from influence.tokenization import Encoded
from influence.unit_tables import unique_rows
from influence.units import Unit

STAGE = "token_scores"


def token_units(gradients: Sequence[Unit], predictor: str) -> list[Unit]:
    """One unit for each gradient unit, by the predictor (whose centres are H^-1 v) of this key."""
    digest = fingerprint({"gradients": gradients[0].fingerprint, "predictor": predictor}).hex
    return [
        Unit(STAGE, digest, unit.file, unit.first, unit.last, needs=(predictor, *unit.needs))
        for unit in gradients
    ]


def read_directions(tools: Toolbox, url: str, key: str) -> dict[str, Tensor]:
    """H^-1 v of every column, as the layers' parameters are stored, on the replica's device."""
    products = torch.from_numpy(read_predictor(url, key).centres)
    return split_directions(tools.layers, products.to(tools.replica.device))


def score_table(
    tools: Toolbox,
    directions: Mapping[str, Tensor],
    encoded: Sequence[Encoded],
    token_budget: int,
) -> pa.Table:
    """A row for each encoded one: the scores, and a variance of 0; null where it has no tokens."""
    first_of, unique = unique_rows(encoded)
    columns = len(next(iter(directions.values())))
    found = np.full((len(unique), columns + 1), np.nan)

    def compute(batch: Batch) -> np.ndarray:
        moved = batch.to(tools.replica.device)
        tokens, samples = token_products(tools.replica.model, moved, directions)
        return max_over_tokens(tokens.double(), samples, len(batch.positions)).cpu().numpy()

    for batch, scores in computed(make_batches(unique, token_budget), tools.limit, compute):
        found[batch.positions, :-1], found[batch.positions, -1] = scores, 0.0
    values = found[first_of]
    missing = ~np.isfinite(values.sum(axis=1))
    values[missing] = 0.0
    layout = VectorLayout(dtype="float64", dim=values.shape[1])
    rows = pa.array([row.row for row in encoded], type=pa.int64())
    return pa.Table.from_arrays(
        [rows, vector_column(values, missing)], schema=score_shard_schema(layout)
    )
