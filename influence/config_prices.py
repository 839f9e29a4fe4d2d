"""The config's section on what nodes cost."""

from __future__ import annotations

from pydantic import Field

from influence.config_section import PositiveFloat, PositiveInt, Section


class PricesConfig(Section):
    """What a node costs, for the bill of `influence plan` and of a run."""

    node_hour: PositiveFloat | None = Field(None, description="price of one node for an hour")
    replicas_per_node: PositiveInt = Field(1, description="replicas that share a node")
    currency: str = Field(
        "USD",
        pattern="^([A-Za-z]{1,8}|[$€£¥])$",
        description="what prices are in; a word or a sign",
    )
