"""What the stages read of a config, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from influence.config import Config
from influence.fingerprints import embedding_values
from influence.gradients import Choice
from influence.loss import Reduction
from influence.optimizer_use import scaled_stages


@dataclass(frozen=True)
class StageSettings:
    """Plain values that the stages read; `scaled`: those whose gradients the optimiser scales.

    `updates`: of candidates AdamW's updates take the place (`influence.update_engine`).
    """

    embedding: Mapping[str, Any]
    parameters: Choice
    parameter_blocks: str
    reduction: Reduction
    normalize: bool
    projection: str
    exact_norms: bool
    side: int
    dim: int
    seed: int
    layers: tuple[str, ...] | None = None
    layer_dim: int = 0
    layer_sketch: str = ""
    optimizer: str = "sgd"
    optimizer_state: str | None = None
    scaled: frozenset[str] = frozenset()
    updates: bool = False


def stage_settings(config: Config) -> StageSettings:
    """The plain values that the stages read, out of the config."""
    gradients, embedding = config.gradients, config.embedding
    kind = embedding_values(config)["embedding"]
    return StageSettings(
        embedding={
            "kind": kind,
            "blocks": embedding.blocks,
            "tangents": embedding.tangents,
            "tangent": embedding.tangent,
            "dim": embedding.dim,
            "seed": config.seed,
        },
        parameters=gradients.parameters,
        parameter_blocks=gradients.blocks,
        reduction=gradients.loss_reduction,
        normalize=gradients.normalize,
        projection=gradients.projection,
        exact_norms=gradients.norms == "exact",
        side=gradients.side,
        dim=gradients.dim,
        seed=config.seed,
        layers=config.layer_patterns,
        layer_dim=gradients.layer_dim,
        layer_sketch=gradients.layer_sketch,
        optimizer=config.optimizer.kind,
        optimizer_state=config.optimizer.state,
        scaled=scaled_stages(config),
    )
