"""The config's section on the cheap embedding of every candidate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from influence.config_section import PositiveInt, Section


class NamedEmbedding(Section):
    """One embedding; a kind reads what it needs of the other values."""

    kind: Literal["jvp", "hidden", "rds"] = "jvp"
    blocks: PositiveInt = 4
    tangents: PositiveInt = 2
    tangent: Literal["rank1", "dense"] = "rank1"
    dim: PositiveInt = 4096


class EmbeddingConfig(Section):
    """The cheap embedding of every candidate."""

    kind: Literal["jvp", "hidden", "rds", "auto"] = Field(
        "jvp", description="auto: the one that a pilot finds to cost least for landmarks.recall"
    )
    blocks: PositiveInt = 4
    tangents: PositiveInt = 2
    tangent: Literal["rank1", "dense"] = "rank1"
    dim: PositiveInt = 4096
    pilot: Annotated[int, Field(ge=16)] = Field(
        256, description="auto: random candidates that are embedded in every way to choose from"
    )
    choices: Annotated[list[NamedEmbedding], Field(min_length=1)] | None = Field(
        None,
        description="auto: the embeddings to choose from; default: jvp and hidden of 2 and 4 "
        "blocks, and rds",
    )
