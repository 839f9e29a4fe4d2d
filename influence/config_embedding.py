"""The config's section on the cheap embedding of every candidate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from influence.config_section import PositiveInt, Section


class NamedEmbedding(Section):
    """One embedding; a kind reads what it needs of the other values."""

    kind: Literal["jvp", "hidden", "rds"] = Field("jvp", description="as embedding.kind")
    blocks: PositiveInt = Field(4, description="jvp, hidden: the first so many decoder blocks")
    tangents: PositiveInt = Field(2, description="jvp: random directions of their parameters")
    tangent: Literal["rank1", "dense"] = Field("rank1", description="as embedding.tangent")
    dim: PositiveInt = Field(4096, description="length at most; longer ones are projected")


class EmbeddingConfig(Section):
    """The cheap embedding of every candidate."""

    kind: Literal["jvp", "hidden", "rds", "auto"] = Field(
        "jvp",
        description="jvp: forward-mode derivative of the hidden state after the first blocks; "
        "hidden: that state itself, at the last token; rds: last hidden states, weighted mean; "
        "auto: the one that a pilot finds to cost least for landmarks.recall",
    )
    blocks: PositiveInt = Field(4, description="jvp, hidden: the first so many decoder blocks")
    tangents: PositiveInt = Field(2, description="jvp: random directions of their parameters")
    tangent: Literal["rank1", "dense"] = Field(
        "rank1", description="jvp: outer products, which cost next to nothing, or dense Gaussians"
    )
    dim: PositiveInt = Field(4096, description="length at most; longer ones are projected")
    pilot: Annotated[int, Field(ge=16)] = Field(
        256, description="auto: random candidates that are embedded in every way to choose from"
    )
    choices: Annotated[list[NamedEmbedding], Field(min_length=1)] | None = Field(
        None,
        description="auto: the embeddings to choose from; default: jvp and hidden of 2 and 4 "
        "blocks, and rds",
    )
