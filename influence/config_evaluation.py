"""The config's section on evaluations: one class for each, as in `influence.evaluations`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from influence.config_downstream import DownstreamConfig
from influence.config_fidelity import FidelityConfig
from influence.config_retraining import LdsConfig, LeaveOneOutConfig
from influence.config_section import PositiveInt, Section


class ClassDetectionConfig(Section):
    """DataInf's benchmark: are a target row's most influential candidates of its own class?"""

    column: str = Field(min_length=1, description="column of candidates and targets: the class")


class GroupInfluenceConfig(Section):
    """What leaving a selection out of the training would do to the targets' losses."""

    run: str | None = Field(None, description="whose selection; default: `run`")


class ReductionsConfig(Section):
    """The ways to turn token gradients into a row's, compared."""


class ExactInverseConfig(Section):
    """How far DataInf is from the inverse that it stands for."""

    rows: Annotated[int, Field(ge=8)] = Field(
        256, description="random candidates, whose gradients have to fit into memory"
    )


class EvaluationConfig(Section):
    """What `influence evaluate` measures; null: not, {}: with the defaults."""

    class_detection: ClassDetectionConfig | None = None
    group_influence: GroupInfluenceConfig | None = None
    reductions: ReductionsConfig | None = None
    exact_inverse: ExactInverseConfig | None = None
    lds: LdsConfig | None = None
    leave_one_out: LeaveOneOutConfig | None = None
    downstream: DownstreamConfig | None = None
    fidelity: FidelityConfig | None = Field(
        None, description="predicted scores against exact ones, over a grid of settings"
    )
    seeds: PositiveInt = Field(3, description="trainings of each selection")
