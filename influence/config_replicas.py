"""The config's sections on the pool of replicas, and on what its nodes cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

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


class ReplicasConfig(Section):
    """The pool of replica actors, and what each one holds."""

    min: PositiveInt = Field(1, description="replicas that stay up, however little work there is")
    max: PositiveInt = Field(8, description="replicas while there is work for them")
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        1, description="of one replica; 0 on machines without a GPU"
    )
    num_cpus: PositiveInt = Field(4, description="of one replica: its threads")
    token_budget: PositiveInt = Field(4096, description="tokens of a batch, padding included")
    rows_per_shard: PositiveInt = Field(512, description="candidates of an embedding shard")
    gradient_rows_per_shard: PositiveInt = Field(64, description="rows of a gradient shard")
    retries: Annotated[int, Field(ge=0)] = Field(3, description="attempts after the first one")
    shard_seconds: PositiveFloat = Field(3600, description="time limit of one shard")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self
