"""Gradients of both factors of a LoRA layer of peft, with the whole layer as one operation.

The layer computes y = W x + s B A x. Seen as linear layers of their own (the rule `linear`) A and B
cost two hooks and two nodes of the graph each, and the product by s and the sum are passes over the
widest tensor that there is. Here the forward of the layer is replaced by one function whose
backward hands both factors' terms over: s multiplies the narrow side, and the sums are part of the
matrix products.

With h = s A x and output gradients d the terms are dA = (s B' d) x' and dB = d h' (LoRA, arXiv
2106.09685, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from influence.gradients.rule import Presentation, Rows, Rule, Sink, plain, replaced_forward
from influence.gradients.term import Term

Give = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def plain_adapter(module: nn.Module) -> str | None:
    """The adapter of a peft layer that is LoRA and nothing else; None for all others.

    Several active adapters, variants (DoRA, ...), biases of B, merged or disabled adapters and
    peft's classes for quantised layers are all others.
    """
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or module.disable_adapters or module.merged:
        return None
    if len(module.active_adapters) != 1:
        return None
    (adapter,) = module.active_adapters
    if adapter not in module.lora_A or adapter in module.lora_variant:
        return None
    factors = module.lora_A[adapter], module.lora_B[adapter]
    if any(type(factor) is not nn.Linear or factor.bias is not None for factor in factors):
        return None
    return adapter


def _presentations(module: nn.Module) -> dict[str, Presentation]:
    return {
        name: plain(parameter)
        for name, parameter in module.named_parameters()
        if name.startswith(("lora_A.", "lora_B."))
    }


@contextmanager
def _attach(module: Any, sinks: Mapping[str, Sink], rows: Rows) -> Iterator[None]:
    adapter = plain_adapter(module)
    assert adapter is not None
    names = f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"
    sink_a, sink_b = (sinks.get(name) for name in names)
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    scaling, base = module.scaling[adapter], module.base_layer
    # A leaf that makes the graph begin here if it has not yet begun; its gradient is not computed.
    start = torch.zeros((), requires_grad=True, device=a.device)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        placement = rows.placement(module)

        def give(x: Tensor, h: Tensor, d: Tensor, d_h: Tensor) -> None:
            if sink_a is not None:
                sink_a.give(Term(placement.cut(x), placement.cut(d_h), placement.sample(d.device)))
            if sink_b is not None:
                sink_b.give(Term(placement.cut(h), placement.cut(d), placement.sample(d.device)))

        for sink in (sink_a, sink_b):
            if sink is not None:
                sink.expect()
        if _fusible(base, x, a) and not args and not kwargs:
            return _apply(_Fused, start, x, base.weight, base.bias, a, b, scaling, give)
        return _apply(_Added, start, base(x, *args, **kwargs), x, a, b, scaling, give)

    with replaced_forward(module, forward):
        yield


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    found = function.apply(*arguments)
    assert isinstance(found, Tensor)
    return found


def _fusible(base: nn.Module, x: Tensor, a: Tensor) -> bool:
    """Whether the base is a plain matrix in the precision of the factors, and no one watches it."""
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and base.weight.dtype == a.dtype == x.dtype
        and not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        and not base.weight.requires_grad
    )


class _Fused(torch.autograd.Function):
    """W x + bias + s B A x, where W is frozen and of the factors' precision."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        x: Float[Tensor, "*n in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        a: Float[Tensor, "r in"],
        b: Float[Tensor, "out r"],
        scaling: float,
        give: Give,
    ) -> Float[Tensor, "*n out"]:
        del start
        y = F.linear(x, weight, bias)
        h = F.linear(x, a).mul_(scaling)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.T)
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.scaling, ctx.give = scaling, give
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = gradients
        x, h, weight, a, b = ctx.saved_tensors
        d_h = torch.matmul(d, b).mul_(ctx.scaling)
        ctx.give(x, h, d, d_h)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = torch.matmul(d, weight)
            d_x.view(-1, d_x.shape[-1]).addmm_(d_h.view(-1, d_h.shape[-1]), a)
        return None, d_x, None, None, None, None, None, None


class _Added(torch.autograd.Function):
    """base + s B A x for the output of any base layer, in whatever precision that is."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        base: Float[Tensor, "*n out"],
        x: Float[Tensor, "*n in"],
        a: Float[Tensor, "r in"],
        b: Float[Tensor, "out r"],
        scaling: float,
        give: Give,
    ) -> Float[Tensor, "*n out"]:
        del start
        h = F.linear(x.to(a.dtype), a).mul_(scaling)
        ctx.save_for_backward(x, h, a, b)
        ctx.scaling, ctx.give = scaling, give
        return (base + F.linear(h, b)).to(base.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d,) = gradients
        x, h, a, b = ctx.saved_tensors
        own = d.to(a.dtype)
        d_h = torch.matmul(own, b).mul_(ctx.scaling)
        ctx.give(x.to(a.dtype), h, own, d_h)
        d_x = torch.matmul(d_h, a).to(x.dtype) if ctx.needs_input_grad[2] else None
        return None, d if ctx.needs_input_grad[1] else None, d_x, None, None, None, None


LORA = Rule(name="lora", present=_presentations, attach=_attach, replaces_forward=True)
