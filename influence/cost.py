"""What a stage costs: floating-point operations, and the memory of a replica, from counts alone.

A multiplication and an addition are two operations; a token passes a weight once in the forward
pass (2 operations), once in the backward pass of the activations, and once where per-sample
gradients or inner products are formed. Attention's products of a row's tokens with each other count
in full: a causal mask is not taken off, as not every kernel saves what it hides. Norms, activation
functions, the optimiser-free rest and padding are left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from math import ceil

from influence.config import Config
from influence.errors import InputError
from influence.fingerprints import embedding_values
from influence.gradients.contractions import TRANSIENT_BYTES
from influence.load import Load
from influence.model_shape import ModelShape
from influence.optimizer_use import TARGET_GRADIENTS, scaled_stages
from influence.token_products import AT_ONCE


def forward(shape: ModelShape, load: Load, blocks: int | None = None) -> float:
    """A forward pass through some blocks, without the output head."""
    part = 1.0 if blocks is None else min(blocks, shape.blocks) / shape.blocks
    return part * (2.0 * shape.block_weights * load.tokens + _attention(shape, load))


def _attention(shape: ModelShape, load: Load) -> float:
    """Queries with keys, and their weights with values, in all blocks."""
    return 4.0 * shape.attention * load.squares


def head(shape: ModelShape, load: Load) -> float:
    """Logits at response positions, forward and backward."""
    return 4.0 * shape.head_weights * load.response_tokens


def embedding(
    shape: ModelShape, load: Load, kind: str, blocks: int, tangents: int, tangent: str = "rank1"
) -> float:
    """jvp: a pass of the values and one for each tangent; hidden: one; rds: one, of all blocks.

    Of the last of some blocks the feed-forward part sees a row's last token alone. A tangent's
    attention is twice the values': queries and keys, and weights and values, move both. So do a
    matrix and its input where the tangent is dense; of rank one the matrix's own part is little.
    """
    if kind == "rds":
        return forward(shape, load)
    part = min(blocks, shape.blocks) / shape.blocks
    spared = 2.0 * shape.feed_forward / shape.blocks * (load.tokens - load.rows)
    if kind == "hidden":
        return forward(shape, load, blocks) - spared
    linear = 2.0 * shape.block_weights * load.tokens * part - spared
    moved = 2 if tangent == "dense" else 1
    return (1 + moved * tangents) * linear + (1 + 2 * tangents) * _attention(shape, load) * part


def passes(shape: ModelShape, load: Load) -> float:
    """Forward, and backward as far as attributed layers lie; no gradient is formed."""
    linear = 2.0 * shape.block_weights * load.tokens
    backward = shape.backward * (linear + 2 * _attention(shape, load))
    return forward(shape, load) + backward + head(shape, load)


def forming(shape: ModelShape, load: Load) -> float:
    """Per-sample gradients, layer by layer; exact norms alone take this at most."""
    head_part = 2.0 * shape.head_attributed * load.response_tokens
    return 2.0 * shape.formed * load.tokens + head_part


def training(shape: ModelShape, load: Load, *, checkpointing: bool = False) -> float:
    """Forward, backward, and the gradients of LoRA factors; with checkpoints one more forward."""
    again = forward(shape, load) if checkpointing else 0.0
    return passes(shape, load) + forming(shape, load) + again


def gradients(
    shape: ModelShape,
    load: Load,
    projection: str,
    side: int,
    dim: int,
    *,
    exact_norms: bool = True,
    scaled: bool = False,
) -> float:
    """Forward, backward of activations, gradients (at most, for exact norms), projection.

    scaled: entry by entry by an optimiser, for which every gradient is formed first.
    """
    if projection == "kronecker" and scaled:
        projecting = 2.0 * side * shape.attributed * load.rows
    elif projection == "kronecker":
        # A side takes one pass over its numbers; the products of two halves of side/2 remain.
        projecting = (4.0 * shape.sides + side**2 * shape.layers) * load.tokens
    elif projection == "countsketch":
        # A transform of dim numbers for either side of every layer and token.
        projecting = 10.0 * dim * math.log2(dim) * shape.layers * load.tokens
    elif projection == "srht":
        # Products with 32 x 32 matrices, one for every five bits of a layer's size, in two halves.
        bits = math.log2(max(2.0, shape.attributed / max(1, shape.layers)))
        projecting = 4.0 * 32 * bits / 5 * shape.attributed * load.rows
    elif projection == "rademacher":
        projecting = 2.0 * dim * shape.attributed * load.rows
    else:
        projecting = 0.0  # layerwise: little beside forming the layers
    formed = 0.0
    if exact_norms or scaled or projection not in ("kronecker", "countsketch"):
        formed = forming(shape, load)
    return passes(shape, load) + formed + projecting


def inner_products(shape: ModelShape, load: Load) -> float:
    """Forward, backward of activations, and per-sample gradients formed layer by layer."""
    products = 2.0 * shape.attributed * load.products
    return passes(shape, load) + forming(shape, load) + products


def target_vectors(shape: ModelShape, load: Load) -> float:
    """Two passes: exact norms first, then the sum of unit gradients."""
    return 2 * (passes(shape, load) + forming(shape, load))


def directions(shape: ModelShape, load: Load) -> float:
    """Forward, backward, every row's gradient, and its part of each sum."""
    return passes(shape, load) + forming(shape, load) + 2.0 * shape.attributed * load.products


def hessian_products(shape: ModelShape, load: Load) -> float:
    """A training pass, and for every direction a backward pass through both of its own."""
    along = load.products / max(1, load.rows)
    return (1.0 + 2.0 * along) * training(shape, load)


def token_scores(shape: ModelShape, load: Load) -> float:
    """Derivatives of all tokens' losses along every column: tangents, and some share a pass."""
    columns = load.products / max(1, load.rows)
    values = forward(shape, load) + head(shape, load) / 2
    moved = values + _attention(shape, load) + forming(shape, load)
    return ceil(columns / AT_ONCE) * values + columns * moved


def _embedding(config: Config, shape: ModelShape, load: Load) -> float:
    settings, kind = config.embedding, embedding_values(config)["embedding"]
    return embedding(shape, load, kind, settings.blocks, settings.tangents, settings.tangent)


def _gradients(stage: str, config: Config, shape: ModelShape, load: Load) -> float:
    settings = config.gradients
    exact, sizes = settings.norms == "exact", (settings.side, settings.dim)
    scaled = stage in scaled_stages(config)
    return gradients(shape, load, settings.projection, *sizes, exact_norms=exact, scaled=scaled)


#: Operations of a load, by the stage in which models compute it.
STAGES: dict[str, Callable[[Config, ModelShape, Load], float]] = {
    "embedding": _embedding,
    "gradients": partial(_gradients, "gradients"),
    TARGET_GRADIENTS: partial(_gradients, TARGET_GRADIENTS),
    "target_vectors": lambda _config, shape, load: target_vectors(shape, load),
    "inner_products": lambda _config, shape, load: inner_products(shape, load),
    "offset_products": lambda _config, shape, load: inner_products(shape, load),
    "directions": lambda _config, shape, load: directions(shape, load),
    "offset_vector": lambda _config, _shape, _load: 0.0,
    "hessian_products": lambda _config, shape, load: hessian_products(shape, load),
    "token_scores": lambda _config, shape, load: token_scores(shape, load),
}


def scores(rows: int, width: int, centres: int, columns: int, *, variance: bool) -> float:
    """One map from embeddings of `width` numbers: kernel, scores, and with `variance` theirs."""
    spread = centres if variance else 0
    return 2.0 * rows * centres * (width + 2 + columns + spread)


def curvature(rows: int, width: int, columns: int) -> float:
    """DataInf's sums: products of gradients with the targets', and of those with the gradients."""
    return 4.0 * rows * width * columns


def regression(landmarks: int, width: int, columns: int) -> float:
    """Kernel, its factorisation, and the inverse that leaving one out takes."""
    return 2.0 * landmarks**2 * (width + 3 * columns) + 4.0 / 3 * landmarks**3


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
    optimizer: int

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


def replica_memory(
    config: Config, shape: ModelShape, dtype: str, response_share: float, columns: int
) -> ReplicaMemory:
    """What the largest batch of gradients takes, from counts.

    weights: all parameters. activations: every block keeps about twice the numbers that its
    matrices give a token (what autograd saves of them, and the inputs that the gradients need) and
    eight times the residual stream (norms and residuals), until the backward pass comes by. logits:
    of the response tokens, with softmax and gradient in float32. projection: the signs and slots of
    the kronecker projection, or the targets' full gradients (`columns` of them), or the directions
    of weights.curvature: hvp. layer: what the
    largest layer's contraction holds. optimizer: a number for every attributed one, in float32, if
    gradients are scaled by its state's moments; SGD scales a layer as a whole. In second order as
    many for its offset.
    """
    size, tokens = _DTYPE_BYTES[dtype], config.replicas.token_budget
    per_token = 2 * shape.outputs + 8 * shape.hidden * shape.blocks
    wide = max(size, 4)
    projection = 0
    if config.gradients.projection == "kronecker":
        slots = config.gradients.side**2 * shape.layers // 2
        projection = 8 * shape.sides + 12 * slots
    elif config.gradients.projection == "exact":
        projection = target_bytes(shape, columns)
    second = config.weights.order == 2
    offset = second and config.optimizer.state is not None
    if second and config.weights.curvature == "hvp":
        # Made in one pass, when the projection is not at work.
        projection = max(projection, target_bytes(shape, config.weights.directions))
    return ReplicaMemory(
        weights=size * shape.parameters,
        activations=size * per_token * tokens,
        logits=int(tokens * response_share) * shape.vocabulary * (size + 3 * wide),
        projection=projection,
        layer=2 * TRANSIENT_BYTES,
        optimizer=4 * shape.attributed * ((config.optimizer.kind != "sgd") + offset),
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


def check_direction_bytes(config: Config, shape: ModelShape, directions: int) -> None:
    """Refuse more directions than a replica can add up at once; from counts.

    Raises:
        InputError: states the bytes that are needed and those that there are.
    """
    needed, (limit, why) = target_bytes(shape, directions), target_bytes_limit(config)
    if needed > limit:
        raise InputError(
            f"weights.directions: {directions} directions x {shape.attributed:,} parameters x 4 "
            f"bytes = {needed:,} bytes in a replica; expected at most {limit:,} ({why}): use fewer "
            "directions, gradients.parameters: lora or fewer of them, or weights.curvature: fisher"
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
