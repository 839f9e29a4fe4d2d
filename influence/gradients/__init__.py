"""Per-sample gradients by one backward pass, with one rule per layer type."""

from influence.gradients.coverage import CoverageRow, coverage
from influence.gradients.layers import RULES, Layer, Parameters, attributed_layers
from influence.gradients.mean import mean_gradient
from influence.gradients.per_sample import (
    Block,
    Engine,
    SampleGradients,
    block_layout,
    make_engine,
)
from influence.gradients.rule import LayerRule

__all__ = [
    "RULES",
    "Block",
    "CoverageRow",
    "Engine",
    "Layer",
    "LayerRule",
    "Parameters",
    "SampleGradients",
    "attributed_layers",
    "block_layout",
    "coverage",
    "make_engine",
    "mean_gradient",
]
