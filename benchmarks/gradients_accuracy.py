"""How well do projected gradients keep cosines? `python gradients_accuracy.py JOB OUT`.

Over pairs of rows, against cosines of unprojected gradients of the decoder blocks' matrices
(products and norms summed in float64) stand those of projections with equally many numbers a row,
once with exact norms, <v_i, v_j> / (|g_i| |g_j|), once with the vectors' own,
<v_i, v_j> / (|v_i| |v_j|).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradients_protocol import Job, TokenRow, load_model, padded, read_job, read_rows
from jaxtyping import Float
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from influence.gradients import Layer, attributed_layers, make_engine
from influence.gradients.backward import backpropagate
from influence.gradients.contractions import formed_gradients
from influence.gradients.term import Term
from influence.projection import layer_shapes, make_projection

SIDES = (16, 32, 64, 128)
TOKEN_BUDGET = 1024
# A dense projection of more numbers than this takes minutes a row.
LARGEST_FOR_RADEMACHER = 10_000_000


def full_gradients(
    model: Any, layers: Sequence[Layer], rows: Sequence[TokenRow], device: str
) -> dict[str, Float[Tensor, "m out in"]]:
    """The unprojected gradient of every row, by layer name."""
    whole = {
        layer.name: torch.zeros(len(rows), layer.out_features, layer.in_features, device=device)
        for layer in layers
    }
    for batch in padded(rows, TOKEN_BUDGET, device):
        positions = torch.tensor(batch.positions, device=device)

        def consume(layer: Layer, terms: list[Term], positions: Tensor = positions) -> None:
            for formed in formed_gradients(terms):
                blocks = whole[layer.name].view(len(rows), layer.parts, -1, layer.in_features)
                where = positions[formed.sample]
                if formed.part is None:
                    whole[layer.name][where] = formed.gradients.to(whole[layer.name].dtype)
                else:
                    blocks[where, formed.part] = formed.gradients.to(blocks.dtype)

        backpropagate(model, layers, batch, reduction="mean", consume=consume)
    return whole


def exact_products(
    model: Any, layers: Sequence[Layer], rows: Sequence[TokenRow], job: Job
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """Inner products of all pairs of rows' gradients, and norms; as many rows are held at once as
    the job's gradient_bytes hold. The upper triangle is computed and mirrored."""
    size = 4 * sum(layer.size for layer in layers)
    chunk = max(1, int(job.gradient_bytes / size))
    products = np.zeros((len(rows), len(rows)))
    norms = np.zeros(len(rows))
    for first in range(0, len(rows), chunk):
        targets = full_gradients(model, layers, rows[first : first + chunk], job.device)
        engine = make_engine(model, layers, reduction="mean", targets=targets)
        for batch in padded(rows[first:], TOKEN_BUDGET, job.device):
            found = engine(batch)
            assert found.products is not None
            where = np.array(batch.positions) + first
            products[where, first : first + chunk] = found.products.cpu().numpy()
            norms[where] = found.norm.cpu().numpy()
    lower = np.tril(products)
    return lower + np.tril(lower, -1).T, norms


def projections(layers: Sequence[Layer], job: Job) -> Iterator[tuple[str, Any]]:
    """(name, projection) of all kinds with the job's dim, or all that a small model has for it."""
    shapes = layer_shapes(layers)
    wanted = [("kronecker", side) for side in SIDES] + [("srht", 0), ("countsketch", 0)]
    if sum(layer.size for layer in layers) <= LARGEST_FOR_RADEMACHER:
        wanted.append(("rademacher", 0))
    for kind, side in wanted:
        name = f"{kind}_{side}" if side else kind
        yield (
            name,
            make_projection(kind, shapes, side=side, dim=job.dim, seed=job.seed, device=job.device),
        )


def correlations(
    vectors: Float[np.ndarray, "n d"],
    norms: Float[np.ndarray, " n"],
    exact: Float[np.ndarray, "n n"],
) -> dict[str, float]:
    """Pearson and Spearman correlations over pairs i < j with the exact cosines."""
    products = vectors @ vectors.T
    own = np.sqrt(np.diag(products))
    pairs = np.triu_indices(len(vectors), 1)
    truth = (exact / np.outer(norms, norms))[pairs]
    found = {}
    for way, lengths in (("exact", norms), ("own", own)):
        cosines = (products / np.outer(lengths, lengths))[pairs]
        found[f"pearson_{way}_norms"] = float(pearsonr(cosines, truth)[0])  # pyright: ignore
        found[f"spearman_{way}_norms"] = float(spearmanr(cosines, truth)[0])  # pyright: ignore
        found[f"rms_error_{way}_norms"] = float(np.sqrt(np.mean((cosines - truth) ** 2)))
    return found


def accuracy(job: Job) -> dict[str, dict[str, float]]:
    """{projection: correlations, bytes per row} on the job's rows."""
    torch.set_num_threads(job.threads)
    model, rows = load_model(job), read_rows(job.rows)
    layers = attributed_layers(model, "linear")
    exact, norms = exact_products(model, layers, rows, job)
    found = {}
    for name, projection in projections(layers, job):
        engine = make_engine(model, layers, reduction="mean", projection=projection)
        vectors = np.zeros((len(rows), projection.dim))
        for batch in padded(rows, TOKEN_BUDGET, job.device):
            result = engine(batch)
            assert result.vectors is not None
            vectors[batch.positions] = result.vectors.double().cpu().numpy()
        found[name] = {**correlations(vectors, norms, exact), "bytes_per_row": 4 * projection.dim}
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(accuracy(read_job(sys.argv[1]))), encoding="utf-8")
