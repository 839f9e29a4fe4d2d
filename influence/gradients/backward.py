"""One backward pass that hands every layer's input X and output gradient D to a consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.blocks import eval_mode
from influence.gradients.layers import Layer
from influence.loss import Reduction, TokenBatch, response_forward, sample_losses

Consumer = Callable[[Layer, Float[Tensor, "b t in"], Float[Tensor, "b t out"]], None]


@dataclass
class _Uses:
    """The calls of one module in one forward pass, and the factors that have come back."""

    pending: int = 0
    factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient and every module is in eval mode; restored on exit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def backpropagate(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: TokenBatch,
    *,
    reduction: Reduction,
    consume: Consumer,
) -> Float[Tensor, " b"]:
    """Calls `consume(layer, X, D)` for each layer during one backward pass; returns the losses.

    D is the gradient of the summed losses with respect to the layer's output; samples do not
    interact, so D_i' X_i is the gradient of sample i's own loss. A module that is called several
    times in one forward gets the tokens of all its calls side by side, which makes D_i' X_i their
    sum. All parameters are frozen: autograd computes no weight gradient, and the graph starts at
    the first attributed layer. X and D are dropped as soon as they are consumed. A layer that
    takes no part in the forward is not handed over: its gradient is zero.
    """
    size = batch.input_ids.shape[0]
    uses = [_Uses() for _ in layers]
    hooks = [
        layer.module.register_forward_hook(_watch(layer, use, size, consume), with_kwargs=True)
        for layer, use in zip(layers, uses, strict=True)
    ]
    try:
        with frozen(model), torch.enable_grad():
            logits, labels, sample_index = response_forward(model, batch)
            losses = sample_losses(logits, labels, sample_index, size, reduction)
            del logits
            losses.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    for layer, use in zip(layers, uses, strict=True):
        # A call whose output has no effect on the loss gets no gradient: the others still count.
        if use.factors:
            _hand_over(layer, use, consume)
    return losses.detach()


def _watch(layer: Layer, use: _Uses, size: int, consume: Consumer) -> Callable[..., None]:
    def after_forward(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        # In a list, to be emptied: the graph keeps its hooks alive until the whole pass is over.
        held: list[Tensor] = [(args[0] if args else next(iter(kwargs.values()))).detach()]
        if not output.requires_grad:
            output.requires_grad_(True)
        use.pending += 1

        def after_backward(gradient: Tensor) -> None:
            with torch.no_grad():
                use.factors.append(layer.rule.factors(module, held.pop(), gradient, size))
                use.pending -= 1
                if use.pending == 0:
                    _hand_over(layer, use, consume)

        output.register_hook(after_backward)

    return after_forward


def _hand_over(layer: Layer, use: _Uses, consume: Consumer) -> None:
    factors, use.factors = use.factors, []
    x, d = factors[0]
    if len(factors) > 1:
        x = torch.cat([pair[0] for pair in factors], dim=1)
        d = torch.cat([pair[1] for pair in factors], dim=1)
    consume(layer, x, d)
