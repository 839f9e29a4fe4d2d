"""Gradients of GPT-2's Conv1D: a linear layer that stores its weight as (in, out)."""

from __future__ import annotations

from torch import nn

from influence.gradients.linear import bias_term, own_parameters, weight_term
from influence.gradients.rule import Presentation, Rule, output_gradients, plain


def _presentations(module: nn.Module) -> dict[str, Presentation]:
    found = {name: plain(parameter) for name, parameter in own_parameters(module).items()}
    stored = found["weight"]
    return {**found, "weight": Presentation(1, stored.in_, stored.out, transposed=True)}


CONV1D = Rule(
    name="conv1d",
    present=_presentations,
    attach=output_gradients({"weight": weight_term, "bias": bias_term}),
    inputs={"weight": "factor", "bias": "unused"},
)
