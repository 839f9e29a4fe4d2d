"""The rule for every layer without one of its own: exact autograd, sample by sample.

During the pass the module's forward is replaced by a loop over the batch's samples, in which each
sample has its own leaf that shares the parameter's storage. One backward pass then leaves every
sample's gradient in that sample's leaf, whatever the module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from influence.errors import InputError
from influence.gradients.rule import Presentation, Rows, Rule, Sink, plain
from influence.gradients.term import OneHot, Term


def _presentations(module: nn.Module) -> dict[str, Presentation]:
    # By dotted names too: a container of parameters has no forward of its own to replace.
    return {name: plain(parameter) for name, parameter in module.named_parameters()}


@contextmanager
def _attach(module: nn.Module, sinks: Mapping[str, Sink], rows: Rows) -> Iterator[None]:
    each: Any = module
    parameters = dict(module.named_parameters())

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        # The module's own forward, for the calls below.
        del each.forward
        try:
            # Inside another such layer there is only its one sample.
            samples = range(rows.size) if rows.only is None else (rows.only,)
            for sample in samples:
                leaves = {name: parameters[name].detach().requires_grad_(True) for name in sinks}
                for name, leaf in leaves.items():
                    sinks[name].expect()
                    leaf.register_post_accumulate_grad_hook(_giver(sinks[name], sample))
                cut = _cutter(rows, sample) if rows.only is None else _as_it_is
                with rows.one_sample(sample):
                    outputs.append(functional_call(module, leaves, cut(args), cut(kwargs)))
        finally:
            each.forward = forward
        return _joined(outputs)

    each.forward = forward
    try:
        yield
    finally:
        del each.forward


def _giver(sink: Sink, sample: int) -> Callable[[Tensor], None]:
    def give(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        matrix = gradient.reshape(1, -1, gradient.shape[-1] if gradient.ndim else 1)
        index = torch.arange(matrix.shape[1], device=matrix.device).unsqueeze(0)
        owner = torch.tensor([sample], device=matrix.device)
        with torch.no_grad():
            sink.give(Term(matrix, OneHot(index, matrix.shape[1]), owner))

    return give


def _as_it_is(value: Any) -> Any:
    return value


def _cutter(rows: Rows, sample: int) -> Callable[[Any], Any]:
    """One sample's part of a call's arguments; what is shared by the batch stays as it is."""
    tokens = slice(sample * rows.tokens, (sample + 1) * rows.tokens)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole_batch = value.shape[:1] == (rows.size,)
            if whole_batch and (value.ndim >= 3 or value.shape == (rows.size, rows.tokens)):
                return value[sample : sample + 1]
            if value.ndim == 2 and value.shape[0] == rows.size * rows.tokens:
                return value[tokens]
            return value
        if isinstance(value, Mapping):
            return {key: cut(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(cut(entry) for entry in value)
        return value

    return cut


def _joined(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, list | tuple):
        return type(first)(_joined(entries) for entries in zip(*outputs, strict=True))
    if first is None:
        return None
    raise InputError(
        f"a layer without a gradient rule returned {type(first).__name__}; expected tensors, "
        "or leave its parameters out with gradients.parameters"
    )


BY_SAMPLE = Rule(name="autograd by sample", present=_presentations, attach=_attach)
