"""The config's sections on evaluations that train the model again."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from influence.config_finetune import FinetuneConfig, HeldOutConfig, held_out_paths
from influence.config_section import PositiveInt, Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


class HeldOutTest(HeldOutConfig):
    """Rows to take the loss of after a training."""

    exact_match: bool = Field(
        False,
        description="also generate answers, and compare final answers with the rows' own",
    )
    max_new_tokens: PositiveInt = Field(256, description="of such an answer")


def method_changes(value: object) -> object:
    """Methods by name with what they change; a name alone changes nothing."""
    if not isinstance(value, dict):
        return value
    return {name: {} if changes is None else changes for name, changes in value.items()}


class RetrainingConfig(Section):
    """What evaluations have in common that hold scores against retraining on a small pool."""

    rows: PositiveInt | None = Field(
        200, description="candidates, drawn at random with the seed; null: the whole pool"
    )
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="NAME: what it changes in this config, {method: rds} say; default: the "
        "config's own method",
    )
    tests: dict[str, HeldOutConfig] | None = Field(
        None, description="TARGET: path of held-out rows; default: each target's own rows"
    )
    finetune: FinetuneConfig | None = Field(
        None, description="how is trained; default: the config's section finetune"
    )

    _paths = field_validator("tests", mode="before")(held_out_paths)

    _nothing_changed = field_validator("methods", mode="before")(method_changes)

    @field_validator("methods")
    @classmethod
    def _plain_names(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"method name {name!r}: use letters, digits, '-', '_' and '.'")
        return value


class LdsConfig(RetrainingConfig):
    """The linear datamodeling score: do scores rank random subsets as training on them does?"""

    subsets: Annotated[int, Field(ge=4)] = Field(100, description="that are trained on")
    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="of the rows, in each")
    seeds: PositiveInt = Field(1, description="trainings on each subset")
    per_row: bool = Field(
        True, description="also for every target row by itself, where the tests are the targets"
    )


class LeaveOneOutConfig(RetrainingConfig):
    """Do scores of single rows say what training without them does?"""

    each: PositiveInt = Field(10, description="rows from the top, and from the bottom")
    random: Annotated[int, Field(ge=4)] = Field(
        20, description="random rows, by which all methods are compared"
    )
    by: str | None = Field(
        None, description="the method whose top and bottom rows are left out; default: the first"
    )
    seeds: PositiveInt = Field(3, description="trainings without each row")
