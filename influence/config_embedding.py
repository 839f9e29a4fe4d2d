"""The config's section on the cheap embedding of every candidate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from influence.config_section import PositiveInt, Section


class EmbeddingConfig(Section):
    """The cheap embedding of every candidate."""

    kind: Literal["jvp", "hidden", "rds", "auto"] = Field(
        "jvp",
        description="jvp: forward-mode derivative of the hidden state after the first blocks; "
        "hidden: that state itself, at the last token; rds: last hidden states, weighted mean",
    )
    blocks: PositiveInt = Field(4, description="jvp, hidden: the first so many decoder blocks")
    tangents: PositiveInt = Field(2, description="jvp: random directions of their parameters")
    tangent: Literal["rank1", "dense"] = Field(
        "rank1", description="jvp: outer products, which cost next to nothing, or dense Gaussians"
    )
    dim: PositiveInt = Field(4096, description="length at most; longer ones are projected")
