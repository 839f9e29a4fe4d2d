"""What a stage costs: floating-point operations and bytes, from counts alone.

A multiplication and an addition are two operations; a token passes a weight once in the forward
pass (2 operations), once in the backward pass of the activations, and once where per-sample
gradients or inner products are formed. Attention's own products are left out: below a few thousand
tokens they are small beside the linear layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from influence.config import Config
from influence.errors import InputError
from influence.model_shape import ModelShape


@dataclass(frozen=True)
class Load:
    """Rows of a stage: their number, tokens, and response tokens."""

    rows: int
    tokens: int
    response_tokens: int


@dataclass(frozen=True)
class StageCost:
    """Operations of a stage and the bytes of vectors that it commits."""

    flops: float
    bytes: int


def forward(shape: ModelShape, load: Load, blocks: int | None = None) -> float:
    """A forward pass through some blocks, without the output head."""
    part = 1.0 if blocks is None else min(blocks, shape.blocks) / shape.blocks
    return 2.0 * shape.block_weights * load.tokens * part


def head(shape: ModelShape, load: Load) -> float:
    """Logits at response positions, forward and backward."""
    return 4.0 * shape.head_weights * load.response_tokens


def embedding(
    shape: ModelShape, load: Load, kind: str, blocks: int, tangents: int, dim: int
) -> StageCost:
    """jvp: one primal pass and one tangent pass for each tangent; hidden: one; rds: all blocks."""
    if kind == "rds":
        return StageCost(forward(shape, load), 2 * load.rows * min(dim, shape.hidden))
    passes = 1 + tangents if kind == "jvp" else 1
    width = shape.hidden * (tangents if kind == "jvp" else 1)
    return StageCost(forward(shape, load, blocks) * passes, 2 * load.rows * min(dim, width))


def gradients(shape: ModelShape, load: Load, side: int, dim: int) -> StageCost:
    """Forward, backward of activations, exact norms (at most the forming of gradients), sketch."""
    sketch = 2.0 * side * shape.sides * load.tokens
    norms = 2.0 * shape.attributed * load.tokens
    flops = 2 * forward(shape, load) + head(shape, load) + norms + sketch
    return StageCost(flops, 4 * load.rows * dim)


def inner_products(shape: ModelShape, load: Load, columns: int) -> StageCost:
    """Forward, backward of activations, and per-sample gradients formed layer by layer."""
    formed = 2.0 * shape.attributed * load.tokens + 2.0 * shape.attributed * columns * load.rows
    flops = 2 * forward(shape, load) + head(shape, load) + formed
    return StageCost(flops, 4 * load.rows * columns)


def target_vectors(shape: ModelShape, load: Load, columns: int) -> StageCost:
    """Two passes: exact norms first, then the sum of unit gradients."""
    once = inner_products(shape, load, 0).flops
    return StageCost(2 * once, 4 * columns * shape.attributed)


# What the full gradients of a run's targets may take of a card; the model needs the rest.
GPU_TARGET_BYTES = 40 * 10**9


def target_bytes(shape: ModelShape, columns: int) -> int:
    """Bytes of the targets' full gradients in every replica (float32)."""
    return 4 * columns * shape.attributed


def target_bytes_limit(config: Config) -> tuple[int, str]:
    """(bytes that full target gradients may take in a replica, where the figure is from).

    On CPUs half of this machine's memory, shared by the replicas that fit on it; on GPUs
    GPU_TARGET_BYTES, or a replica's share of them.
    """
    replicas = config.replicas
    if replicas.num_gpus > 0 and config.model.device != "cpu":
        share = min(1.0, replicas.num_gpus)
        return int(GPU_TARGET_BYTES * share), f"assumed for {share:g} GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fit = max(1, min(replicas.max, (os.cpu_count() or 1) // replicas.num_cpus))
    return memory // (
        2 * fit
    ), f"half of this machine's {memory / 1e9:.1f} GB over {fit} replica(s)"


def check_target_bytes(config: Config, shape: ModelShape, columns: int) -> None:
    """Refuse full target gradients that do not fit; from counts, before a model runs.

    Raises:
        InputError: states the bytes that are needed and those that there are.
    """
    needed, (limit, why) = target_bytes(shape, columns), target_bytes_limit(config)
    if needed > limit:
        raise InputError(
            f"gradients.projection: exact keeps {columns} target columns x {shape.attributed:,} "
            f"parameters x 4 bytes = {needed:,} bytes in every replica; expected at most "
            f"{limit:,} ({why}): use targets.NAME.per: group, fewer target rows, or projection: "
            "kronecker"
        )
