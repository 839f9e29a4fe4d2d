"""Gradient of DoRA's magnitude vector in peft's linear layers.

With the weight norm detached (DoRA, arXiv 2402.09353, section 4.3) the layer adds
(m / |V| - 1) base + (m / |V|) lora to the base output, so that the gradient of m is the sum over
the tokens of D * (added + base) / m.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from influence.gradients.linear import own_parameters, presentations
from influence.gradients.rule import Rows, Rule, Sink, tracked
from influence.gradients.term import summed_rows, wide_dtype


@contextmanager
def _attach(module: nn.Module, sinks: Mapping[str, Sink], rows: Rows) -> Iterator[None]:
    (sink,) = sinks.values()

    def after_forward(_module: nn.Module, args: tuple, kwargs: dict, added: Tensor) -> Tensor:
        placement = rows.placement(module)
        with torch.no_grad():
            base, bias = kwargs["base_result"], kwargs["base_layer"].bias
            whole = added + base if bias is None else added + base - bias
            held = [whole / own_parameters(module)["weight"]]
        if not added.requires_grad:
            added = tracked(added)
        sink.expect()

        def after_backward(gradient: Tensor) -> None:
            with torch.no_grad():
                product = gradient.to(wide_dtype(gradient.dtype)) * held.pop()
                sink.give(
                    summed_rows(placement.cut(product), placement.sample(product.device), None)
                )

        added.register_hook(after_backward)
        return added

    handle = module.register_forward_hook(after_forward, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


DORA = Rule(name="dora magnitude", present=presentations, attach=_attach)
