"""How far a run's precision moves its numbers: a few rows in it, and once more in a wider one."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from influence import stages
from influence.batching import make_batches
from influence.candidates import read_examples, scan_files
from influence.config import Config
from influence.errors import InputError
from influence.methods import METHODS
from influence.own_training import planned_training
from influence.reference import with_reference
from influence.replica import choose_device, load_replica, load_tokenizer, resolve_dtype
from influence.stage_settings import stage_settings
from influence.stages import Toolbox, Vectors
from influence.tokenization import Encoded, make_encoder

SCANNED_ROWS = 256


@dataclass(frozen=True)
class RowNumerics:
    """One row in both precisions: cosines of gradients and embeddings, and what else moved."""

    id: str
    tokens: int
    gradient_cosine: float
    norm_ratio: float
    loss_difference: float
    embedding_cosine: float | None


@dataclass(frozen=True)
class Numerics:
    """Rows of `influence plan --numerics`, and the two precisions."""

    dtype: str
    reference: str
    rows: list[RowNumerics]


def compare_precisions(config: Config, count: int) -> Numerics:
    """Gradients and embeddings of `count` candidates in the run's dtype and in float32.

    A run in float32 is held against float64. The rows are spread over the lengths of the first
    rows that can be scored. The two models are loaded one after the other. Cosines are of the
    projected gradients, both with one and the same projection.

    Raises:
        InputError: no row can be scored.
        ModelLoadError: the model cannot be loaded.

    Example:
        >>> precisions = influence.compare_precisions(config, 2)
        >>> precisions.dtype, precisions.reference, len(precisions.rows)
        ('float32', 'float64', 2)
    """
    with planned_training(with_reference(config)) as (ready, _own):
        return _compared(ready, count)


def _compared(config: Config, count: int) -> Numerics:
    dtype = resolve_dtype(config.model.dtype, config.replicas.num_gpus, config.model.device)
    reference = "float64" if dtype in ("float32", "float64") else "float32"
    rows = spread_rows(config, count)
    embeds = METHODS[config.method].embeds
    ours, theirs = (_vectors(config, each, rows, embeds) for each in (dtype, reference))
    found = []
    for position, row in enumerate(rows):
        embedding = None
        if ours[1] is not None and theirs[1] is not None:
            embedding = _cosine(ours[1].vectors[position], theirs[1].vectors[position])
        a, b = ours[0], theirs[0]
        found.append(
            RowNumerics(
                row.id or f"row {row.row}",
                row.n_tokens,
                _cosine(a.vectors[position], b.vectors[position]),
                float(a.norm[position] / b.norm[position]),
                float(a.loss[position] - b.loss[position]),
                embedding,
            )
        )
    return Numerics(dtype, reference, found)


def spread_rows(config: Config, count: int) -> list[Encoded]:
    """So many of the first candidates that can be scored, at even steps of their length.

    Raises:
        InputError: none of them can be.
    """
    data = config.data
    encode = make_encoder(load_tokenizer(config.model), data.max_length, data.loss_on)
    file = scan_files(config.data.candidates, config.data.limit)[0]
    encoded = encode(read_examples(file, 0, min(SCANNED_ROWS, file.rows) - 1))
    usable = sorted((row for row in encoded if row.reason is None), key=lambda row: row.n_tokens)
    if not usable:
        raise InputError(f"{file.url}: none of the first {len(encoded)} rows can be scored")
    places = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int)
    return [usable[place] for place in places]


def _vectors(
    config: Config, dtype: str, rows: Sequence[Encoded], embeds: bool
) -> tuple[Vectors, Vectors | None]:
    """Gradients and embeddings of the rows in one precision, in the order of the rows."""
    device = choose_device(config.model.device, config.replicas.num_gpus)
    settings = stage_settings(config)
    if settings.projection == "exact":
        settings = replace(settings, projection="kronecker")
    tools = Toolbox(load_replica(config.model, dtype, device), settings)
    batches = make_batches(rows, config.replicas.token_budget)
    found = _in_order(stages.gradient_vectors(tools, batches))
    embedded = _in_order(stages.embed(tools, batches)) if embeds else None
    del tools
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found, embedded


def _in_order(vectors: Vectors) -> Vectors:
    order = np.argsort(vectors.positions)
    return Vectors(
        vectors.positions[order], vectors.vectors[order], vectors.norm[order], vectors.loss[order]
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def numerics_table(numerics: Numerics) -> Table:
    """One line per row, the least similar one last."""
    table = Table(title=f"{numerics.dtype} against {numerics.reference}")
    headings = ("row", "tokens", "gradient cosine", "norm ratio", "loss difference", "embedding")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "row" else "right")
    for row in sorted(numerics.rows, key=lambda row: -row.gradient_cosine):
        embedding = "-" if row.embedding_cosine is None else f"{row.embedding_cosine:.6f}"
        table.add_row(
            Text(row.id),
            f"{row.tokens:,}",
            f"{row.gradient_cosine:.6f}",
            f"{row.norm_ratio:.4f}",
            f"{row.loss_difference:+.2e}",
            embedding,
        )
    return table
