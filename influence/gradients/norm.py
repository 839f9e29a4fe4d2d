"""Gradients of LayerNorm's and RMSNorm's weight and bias.

A norm's output is affine in its weight, y = a(x) + w * s(x), in whatever way the weight enters
(Gemma multiplies by 1 + w): s(x) = y(w = 1) - y(w = 0), and the gradient of sample i is the sum of
D * s(X) over its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from influence.gradients.linear import bias_term, own_parameters, presentations
from influence.gradients.rule import Placement, Rule, output_gradients, swapped_parameters
from influence.gradients.term import Term, summed_rows


def slope(module: nn.Module, x: Tensor) -> Tensor:
    """s(x): the derivative of the norm's output with respect to its weight, entry by entry."""
    own = own_parameters(module)
    # Without the bias, which the difference of two outputs would lose digits to.
    zeros = {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    ones = {**zeros, "weight": torch.ones_like(own["weight"])}
    return _output(module, ones, x) - _output(module, zeros, x)


def _output(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    with swapped_parameters(module, values):
        return module.forward(x)  # not by calling it: its hooks are for the pass alone


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm: by its name, its parameters, and what it does with a weight."""
    own = own_parameters(module)
    weight = own.get("weight")
    named = "norm" in type(module).__name__.lower() and set(own) <= {"weight", "bias"}
    if not named or weight is None or weight.ndim != 1 or any(module.children()):
        return False
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, len(weight), generator=generator).to(weight)
    x, w, b = draws[:2], draws[2], draws[3]
    values = {"weight": w, "bias": b} if "bias" in own else {"weight": w}
    zero = {**values, "weight": torch.zeros_like(w)}
    with torch.no_grad():
        try:
            expected = _output(module, values, x)
            found = _output(module, zero, x) + w * slope(module, x)
        except (TypeError, RuntimeError):
            return False  # it takes more than one input, or another shape
    rough = weight.dtype in (torch.float16, torch.bfloat16)
    tolerance = 3e-2 if rough else 1e-5
    return expected.shape == x.shape and bool(
        torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    )


def _weight_term(module: nn.Module, x: Tensor, d: Tensor, placement: Placement) -> Term:
    # Wide before the sum over tokens; the slope itself is of the model's precision.
    wide = torch.promote_types(d.dtype, torch.float32)
    product = d.to(wide) * slope(module, x).to(wide)
    return summed_rows(placement.cut(product), placement.sample(d.device), None)


NORM = Rule(
    name="norm",
    present=presentations,
    attach=output_gradients({"weight": _weight_term, "bias": bias_term}),
)
