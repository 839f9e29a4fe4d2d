"""The embeddings a config can ask for, by name, brought to the size it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.blocks import check_depth, find_decoder
from influence.config import Config
from influence.errors import InputError
from influence.jvp import Embed, Tangent, make_jvp_embedder
from influence.methods import METHODS
from influence.model_shape import ModelShape
from influence.pooling import make_hidden_embedder, make_rds_embedder
from influence.projection import rademacher_projection


@dataclass(frozen=True)
class Embedder:
    """embed: (token ids (batch, tokens) padded on the right, lengths (batch,)) -> (batch, dim)."""

    embed: Embed
    dim: int


@dataclass(frozen=True)
class EmbeddingSettings:
    """What the embeddings of the registry are made from; each reads what it needs."""

    blocks: int
    tangents: int
    tangent: Tangent
    seed: int


def _jvp(model: nn.Module, settings: EmbeddingSettings) -> tuple[Embed, int]:
    embed = make_jvp_embedder(
        model,
        blocks=settings.blocks,
        tangents=settings.tangents,
        tangent=settings.tangent,
        seed=settings.seed,
    )
    return embed, settings.tangents * _hidden_size(model)


def _hidden(model: nn.Module, settings: EmbeddingSettings) -> tuple[Embed, int]:
    return make_hidden_embedder(model, blocks=settings.blocks), _hidden_size(model)


def _rds(model: nn.Module, settings: EmbeddingSettings) -> tuple[Embed, int]:
    return make_rds_embedder(model), _hidden_size(model)


# Each factory returns the embedding function and the number of values per sample.
EMBEDDINGS: dict[str, Callable[[nn.Module, EmbeddingSettings], tuple[Embed, int]]] = {
    "jvp": _jvp,
    "hidden": _hidden,
    "rds": _rds,
}


def make_embedder(
    model: nn.Module,
    kind: str,
    *,
    blocks: int,
    tangents: int,
    tangent: Tangent,
    dim: int,
    seed: int,
) -> Embedder:
    """The embedding `kind` of EMBEDDINGS for `model`, of at most `dim` values per sample.

    A longer one is projected to `dim` by a seeded Rademacher projection, which keeps inner
    products in expectation; a shorter one is left alone.

    Raises InputError for an unknown kind, a model without decoder blocks, or too many blocks.
    """
    if kind not in EMBEDDINGS:
        raise InputError(f"embedding.kind: {kind!r}, expected one of {', '.join(EMBEDDINGS)}")
    if dim < 1:
        raise InputError(f"embedding.dim: {dim}, expected at least 1")
    raw, size = EMBEDDINGS[kind](model, EmbeddingSettings(blocks, tangents, tangent, seed))
    if size <= dim:
        return Embedder(raw, size)

    def embed(
        input_ids: Int[Tensor, "batch tokens"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        return rademacher_projection(raw(input_ids, lengths), dim, seed)

    return Embedder(embed, dim)


def _hidden_size(model: nn.Module) -> int:
    # The blocks' own width: a token embedding may be narrower (OPT-350m).
    find_decoder(model)
    return model.config.get_text_config().hidden_size  # pyright: ignore


def check_embedding(config: Config, shape: ModelShape) -> None:
    """See that the model has as many blocks as its embeddings are of, before anything is computed.

    Raises:
        InputError: names embedding.blocks.
    """
    method, kind = METHODS[config.method], config.embedding.kind
    if method.embeds and method.embedding_kind is None and kind in ("jvp", "hidden"):
        check_depth(shape.blocks, config.embedding.blocks)
