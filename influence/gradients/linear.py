"""Gradients of nn.Linear; LoRA's A and B factors are such layers, too."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from influence.gradients.rule import Placement, Presentation, Rule, output_gradients, plain
from influence.gradients.term import Term, summed_rows


def weight_term(module: nn.Module, x: Tensor, d: Tensor, placement: Placement) -> Term:
    """Inputs and output gradients of y = x W' at every token: G_i = D_i' X_i."""
    del module
    return Term(placement.cut(x), placement.cut(d), placement.sample(d.device))


def bias_term(module: nn.Module, x: Tensor, d: Tensor, placement: Placement) -> Term:
    """The gradient of a bias is the sum of the output gradients over the tokens."""
    del module, x
    return summed_rows(placement.cut(d), placement.sample(d.device), None)


def presentations(module: nn.Module) -> dict[str, Presentation]:
    """Every parameter of the module's own as it is stored."""
    return {name: plain(parameter) for name, parameter in own_parameters(module).items()}


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the module itself holds, by their names in it."""
    return cast("dict[str, nn.Parameter]", dict(module.named_parameters(recurse=False)))


LINEAR = Rule(
    name="linear",
    present=presentations,
    attach=output_gradients({"weight": weight_term, "bias": bias_term}),
    inputs={"weight": "factor", "bias": "unused"},
)
