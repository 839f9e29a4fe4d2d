"""The config's section on the evaluation `fidelity`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from influence.config_embedding import NamedEmbedding
from influence.config_section import PositiveFloat, PositiveInt, Section

Kernel = Literal["laplace", "rbf", "linear", "cosine"]


class FidelityConfig(Section):
    """Predicted scores against exact ones, over a grid of settings, and what each costs."""

    pilot: Annotated[int, Field(ge=16)] | None = Field(
        1000, description="random candidates whose exact scores are the truth; null: all of them"
    )
    landmarks: Annotated[list[Annotated[int, Field(ge=4)]], Field(min_length=1)] = Field(
        [64, 128, 256, 512, 1024], description="uniform ones, out of the pilot"
    )
    repeats: PositiveInt = Field(3, description="draws of landmarks for each setting")
    embeddings: Annotated[list[NamedEmbedding], Field(min_length=1)] | None = Field(
        None,
        description="beside the config's own; default: those that `auto` chooses from, and the own "
        "one with other tangents and with 256 numbers",
    )
    kernels: list[Kernel] = Field(
        ["laplace", "rbf", "linear", "cosine"], description="beside landmarks.kernel"
    )
    damping: list[PositiveFloat] = Field([0.001, 0.01, 0.1], description="beside landmarks.damping")
    design: Literal["star", "full"] = Field(
        "star", description="star: one thing changed at a time, from the config's own; full: all"
    )
    recalls: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.8, 0.9, 0.95],
        description="what certified rounds are asked for, beside landmarks.recall; []: none",
    )
