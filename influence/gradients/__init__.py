"""Per-sample gradients by one backward pass, with one rule for each type of layer."""

from influence.gradients.coverage import CoverageRow, coverage
from influence.gradients.layers import Layer, attributed_layers
from influence.gradients.mean import mean_gradient
from influence.gradients.parameters import Choice
from influence.gradients.per_sample import (
    Block,
    Engine,
    SampleGradients,
    block_layout,
    make_engine,
)
from influence.gradients.settle import settled_layers
from influence.gradients.weighted import weighted_gradients

__all__ = [
    "Block",
    "Choice",
    "CoverageRow",
    "Engine",
    "Layer",
    "SampleGradients",
    "attributed_layers",
    "block_layout",
    "coverage",
    "make_engine",
    "mean_gradient",
    "settled_layers",
    "weighted_gradients",
]
