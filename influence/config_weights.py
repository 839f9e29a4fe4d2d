"""The config's section on the robust objective, and what its second order asks of others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from influence.config_section import PositiveFloat, PositiveInt, Section


class WeightsConfig(Section):
    """First or second order in the step size."""

    order: Literal[1, 2] = Field(1, description="2: with curvature, so that rows share weight")
    curvature: Literal["fisher", "hvp"] = Field(
        "fisher",
        description="order 2: the targets' own gradients, or exact Hessian-vector products",
    )
    eta: PositiveFloat = Field(1e-4, description="order 2: the step size")
    directions: PositiveInt = Field(
        16, description="hvp: directions that span the landmarks' gradients"
    )


#: (section, key, value) that the second order asks for.
SECOND_ORDER = (
    ("gradients", "normalize", False),
    ("selection", "combine", "mean"),
    ("landmarks", "choose", "uniform"),
)
