"""What a stage costs: floating-point operations and bytes, from counts alone.

A multiplication and an addition are two operations; a token passes a weight once in the forward
pass (2 operations), once in the backward pass of the activations, and once where per-sample
gradients or inner products are formed. Attention's own products are left out: below a few thousand
tokens they are small beside the linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass

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
