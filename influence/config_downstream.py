"""The config's section on the downstream comparison: what is trained on, and tested."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from influence.config_finetune import FinetuneConfig, held_out_paths
from influence.config_retraining import HeldOutTest, method_changes
from influence.config_section import PositiveInt, Section

RANDOM, FULL, UNTRAINED = "random", "full", "untrained"
"""The baseline unless another is named; the whole pool; the model as it is."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_SEEDED = re.compile(r"-seed\d+$")


class DownstreamConfig(Section):
    """Fine-tune on every method's selection, and compare the losses on held-out rows."""

    methods: dict[str, dict[str, Any]] = Field(
        min_length=1, description="NAME: overrides of this config, {method: rds} say"
    )
    tests: dict[str, HeldOutTest] = Field(
        min_length=1, description="TARGET: path; held-out rows of every target"
    )
    baseline: str = Field(
        RANDOM, description="which of the methods the others are compared with; random is built in"
    )
    full: bool = Field(False, description="train on the whole pool, too")
    seeds: PositiveInt | None = Field(
        None, description="trainings of each selection; default: evaluation.seeds"
    )
    finetune: FinetuneConfig | None = Field(
        None, description="how is trained; default: the config's section finetune"
    )
    weighted: bool = Field(False, description="train with influence_weight")

    _paths = field_validator("tests", mode="before")(held_out_paths)

    _nothing_overridden = field_validator("methods", mode="before")(method_changes)

    @model_validator(mode="after")
    def _names(self) -> DownstreamConfig:
        for name in self.methods:
            if not _NAME.fullmatch(name) or _SEEDED.search(name):
                raise ValueError(
                    f"method name {name!r}: use letters, digits, '-', '_', '+' and '.', and no "
                    "'-seedN' at the end"
                )
            if name in (FULL, UNTRAINED):
                raise ValueError(f"method name {name!r} stands for a training of its own")
        if self.baseline not in (RANDOM, *self.methods):
            known = ", ".join(dict.fromkeys((RANDOM, *self.methods)))
            raise ValueError(f"baseline {self.baseline!r} is none of the methods: {known}")
        return self
