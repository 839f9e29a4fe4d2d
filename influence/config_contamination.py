"""The config's section on candidates that are (nearly) rows of a target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from influence.config_section import PositiveInt, Section

Part = Annotated[float, Field(gt=0, le=1)]


class ContaminationConfig(Section):
    """Candidates that are a target's row, or nearly: they rank first, and measure nothing."""

    action: Literal["flag", "drop", "keep"] = Field(
        "flag",
        description="flag: a column says so; drop: never selected; keep: counted, nothing else",
    )
    ngram: PositiveInt = Field(8, description="words of an n-gram, after normalisation")
    overlap: Part = Field(0.5, description="share of a target row's n-grams in the candidate")
    jaccard: Part = Field(0.8, description="of the shingles of two texts, as MinHash estimates it")
    against: dict[str, str | list[str]] = Field(
        default_factory=dict, description="further rows to look for: NAME: files, as for candidates"
    )

    @field_validator("against")
    @classmethod
    def _plain_names(cls, value: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        for name in value:
            if not name or any(character in name for character in "/\\: \t\n"):
                raise ValueError(f"name {name!r}: use letters, digits, '-', '_' and '.'")
        return value


Contamination = Annotated[
    ContaminationConfig | None,
    Field(description="candidates that are (nearly) target rows; null: not looked for"),
]
