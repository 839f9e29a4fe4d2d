"""What a stage costs: floating-point operations and bytes, from counts alone.

A multiplication and an addition are two operations; a token passes a weight once in the forward
pass (2 operations), once in the backward pass of the activations, and once where per-sample
gradients or inner products are formed. Attention's own products are left out: below a few thousand
tokens they are small beside the linear layers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from influence.config import Config
from influence.errors import InputError
from influence.gradients.contractions import TRANSIENT_BYTES
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


def forming(shape: ModelShape, load: Load) -> float:
    """Per-sample gradients, layer by layer; exact norms alone take this at most."""
    head_part = 2.0 * shape.head_attributed * load.response_tokens
    return 2.0 * shape.formed * load.tokens + head_part


def gradients(
    shape: ModelShape,
    load: Load,
    projection: str,
    side: int,
    dim: int,
    *,
    exact_norms: bool = True,
) -> StageCost:
    """Forward, backward of activations, gradients (at most, for exact norms), projection."""
    if projection == "kronecker":
        projecting = 2.0 * side * shape.sides * load.tokens
    elif projection == "countsketch":
        # A transform of dim numbers for either side of every layer and token.
        projecting = 10.0 * dim * math.log2(dim) * shape.layers * load.tokens
    elif projection == "srht":
        # Products with 32 x 32 matrices, one for every five bits of a layer's size, in two halves.
        bits = math.log2(max(2.0, shape.attributed / max(1, shape.layers)))
        projecting = 4.0 * 32 * bits / 5 * shape.attributed * load.rows
    elif projection == "rademacher":
        projecting = 2.0 * dim * shape.attributed * load.rows
    elif projection == "layerwise":
        projecting, dim = 0.0, sum(min(size, dim) for size in shape.sizes.values())
    else:
        projecting, dim = 0.0, shape.attributed
    formed = 0.0
    if exact_norms or projection not in ("kronecker", "countsketch"):
        formed = forming(shape, load)
    flops = 2 * forward(shape, load) + head(shape, load) + formed + projecting
    return StageCost(flops, 4 * load.rows * dim)


def inner_products(shape: ModelShape, load: Load, columns: int) -> StageCost:
    """Forward, backward of activations, and per-sample gradients formed layer by layer."""
    formed = forming(shape, load) + 2.0 * shape.attributed * columns * load.rows
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


_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ReplicaMemory:
    """Bytes that a replica holds while it takes gradients; independent of the number of rows."""

    weights: int
    activations: int
    logits: int
    projection: int
    layer: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.logits + self.projection + self.layer


def replica_memory(
    config: Config, shape: ModelShape, dtype: str, response_share: float, columns: int
) -> ReplicaMemory:
    """What the largest batch of gradients takes, from counts.

    weights: all parameters. activations: every block keeps about twice the numbers that its
    matrices give a token (what autograd saves of them, and the inputs that the gradients need) and
    eight times the residual stream (norms and residuals), until the backward pass comes by. logits:
    of the response tokens, with softmax and gradient in float32. projection: the signs of the
    kronecker projection, or the targets' full gradients (`columns` of them). layer: what the
    largest layer's contraction holds.
    """
    size, tokens = _DTYPE_BYTES[dtype], config.replicas.token_budget
    per_token = 2 * shape.outputs + 8 * shape.hidden * shape.blocks
    wide = max(size, 4)
    projection = 0
    if config.gradients.projection == "kronecker":
        projection = 4 * config.gradients.side * shape.sides
    elif config.gradients.projection == "exact":
        projection = target_bytes(shape, columns)
    return ReplicaMemory(
        weights=size * shape.parameters,
        activations=size * per_token * tokens,
        logits=int(tokens * response_share) * shape.vocabulary * (size + 3 * wide),
        projection=projection,
        layer=2 * TRANSIENT_BYTES,
    )


SHARD_BYTES = 2 * 10**9
"""What a shard of whole gradients may take: a worker holds it twice before it is put."""


def check_vector_bytes(config: Config, shape: ModelShape) -> None:
    """With `projection: none`, refuse whole gradients whose shards would not fit.

    Raises:
        InputError: states the bytes of a row and of a shard.
    """
    row = 4 * shape.attributed
    shard = row * config.replicas.gradient_rows_per_shard
    if config.gradients.projection == "none" and shard > SHARD_BYTES:
        raise InputError(
            f"gradients.projection: none keeps {shape.attributed:,} parameters x 4 bytes = {row:,} "
            f"bytes a row, {shard:,} a shard; expected at most {SHARD_BYTES:,}: use "
            "gradients.parameters: lora or fewer of them, a projection, or a smaller "
            "replicas.gradient_rows_per_shard"
        )


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
