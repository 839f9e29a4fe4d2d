"""One backward pass that hands every layer's gradient terms to a consumer."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.blocks import eval_mode
from influence.errors import InputError
from influence.gradients.layers import Layer
from influence.gradients.rule import Rows, Rule, Sink
from influence.gradients.term import Term, merged
from influence.loss import Reduction, TokenBatch, response_forward, response_samples, sample_losses

Consumer = Callable[[Layer, list[Term]], None]


class Members(NamedTuple):
    """A model's parameters and modules. To walk over them takes as long as some tokens do."""

    parameters: list[nn.Parameter]
    modules: list[nn.Module]


def members_of(model: nn.Module) -> Members:
    """All of them, listed once for many passes."""
    return Members(list(model.parameters()), list(model.modules()))


@contextmanager
def frozen(model: nn.Module, members: Members | None = None) -> Iterator[None]:
    """No parameter requires a gradient and every module is in eval mode; restored on exit."""
    parameters, modules = members_of(model) if members is None else members
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with eval_mode(model, modules):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection inside: a pass makes thousands of small objects and no cycles.

    Collections in the middle of a pass of few tokens took up to a fifth of it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def backpropagate(
    model: nn.Module,
    layers: Sequence[Layer],
    batch: TokenBatch,
    *,
    reduction: Reduction,
    consume: Consumer,
    members: Members | None = None,
    input_sides: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Float[Tensor, " b"]:
    """Calls `consume(layer, terms)` for each layer during one backward pass; returns the losses.

    The terms make up the gradient of each sample's own loss (samples do not interact, so the summed
    losses are differentiated at once); see `Term` and `merged`. All parameters are frozen: autograd
    computes no weight gradient, and the graph starts at the first attributed layer. Terms are
    dropped as soon as they are consumed. A layer that takes no part in the forward is not handed
    over: its gradient is zero. `members`: the model's, where the caller keeps a list of them.
    `input_sides`: by layer, what is made of its inputs as soon as they are there (see
    `Projection.input_side`); where a rule has no use for it the terms are those without it.

    Raises InputError if a layer's rows cannot be told apart by sample.
    """
    size, tokens = batch.input_ids.shape
    response = response_samples(batch).to(next(model.parameters()).device)
    rows = Rows(size, tokens, response, model.get_output_embeddings())  # type: ignore[operator]
    sinks = {each.name: _sink(each, consume, (input_sides or {}).get(each.name)) for each in layers}
    with ExitStack() as stack:
        stack.enter_context(uncollected())
        stack.enter_context(frozen(model, members))
        for module, rule, own in _by_module(layers):
            named = {own_name: sinks[name] for own_name, name in own.items()}
            stack.enter_context(rule.attach(module, named, rows))
        stack.enter_context(torch.enable_grad())
        logits, labels, sample_index = response_forward(model, batch)
        losses = sample_losses(logits, labels, sample_index, size, reduction)
        del logits
        if losses.requires_grad:
            losses.sum().backward()
    for sink in sinks.values():
        sink.flush()
    return losses.detach()


def _by_module(layers: Sequence[Layer]) -> list[tuple[nn.Module, Rule, dict[str, str]]]:
    """Every module that has to be watched once, with its parameters' names there and in full."""
    found: dict[tuple[int, str], tuple[nn.Module, Rule, dict[str, str]]] = {}
    for layer in layers:
        for use in layer.uses:
            key = (id(use.module), use.rule.name)
            found.setdefault(key, (use.module, use.rule, {}))[2][use.own_name] = layer.name
    return list(found.values())


def _sink(layer: Layer, consume: Consumer, side: Callable[[Tensor], Tensor] | None) -> Sink:
    hand_over = _handing_over(layer, consume)
    kinds = {use.rule.inputs.get(use.own_name) for use in layer.uses}
    if kinds == {"unused"}:
        return Sink(hand_over, keep=lambda x: x.new_empty(0))
    if kinds == {"factor"} and side is not None:
        return Sink(hand_over, keep=side, sketched=True)
    return Sink(hand_over)


def _handing_over(layer: Layer, consume: Consumer) -> Callable[[list[Term]], None]:
    def hand_over(terms: list[Term]) -> None:
        try:
            whole = merged(terms)
        except ValueError as error:
            raise InputError(
                f"gradients.parameters: {layer.name}: {error}; leave it out"
            ) from error
        if not torch.is_grad_enabled():  # as in every backward pass
            consume(layer, whole)
            return
        with torch.no_grad():
            consume(layer, whole)

    return hand_over
