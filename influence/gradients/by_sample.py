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

from influence.gradients.rule import (
    Presentation,
    Rows,
    RowsError,
    Rule,
    Sink,
    plain,
    replaced_forward,
    swapped_parameters,
)
from influence.gradients.term import OneHot, Term
from influence.memory import out_of_memory


def _presentations(module: nn.Module) -> dict[str, Presentation]:
    # By dotted names too: parameters of modules that this one reads instead of calling them.
    return {name: plain(parameter) for name, parameter in module.named_parameters()}


@contextmanager
def _attach(module: nn.Module, sinks: Mapping[str, Sink], rows: Rows) -> Iterator[None]:
    parameters = dict(module.named_parameters())
    own_forward = module.forward

    def run(sample: int, args: Any, kwargs: Any) -> Any:
        leaves = {name: parameters[name].detach().requires_grad_(True) for name in sinks}
        for name, leaf in leaves.items():
            sinks[name].expect()
            leaf.register_post_accumulate_grad_hook(_giver(sinks[name], sample))
        with rows.one_sample(sample), swapped_parameters(module, leaves):
            return own_forward(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if rows.only is not None:
            # Inside another such layer there is only its one sample.
            return run(rows.only, args, kwargs)
        if rows.size == 1:
            return run(0, args, kwargs)
        outputs = []
        for sample in range(rows.size):
            cutter = _Cutter(rows, sample)
            own_args, own_kwargs = cutter.cut(args), cutter.cut(kwargs)
            if not cutter.used:
                raise RowsError(module, "called with no tensor that has a row for every sample")
            try:
                outputs.append(run(sample, own_args, own_kwargs))
            except (RuntimeError, TypeError, IndexError) as error:
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                why = f"called with arguments that cannot be cut by sample ({error})"
                raise RowsError(module, why) from error
        return _joined(module, rows, outputs)

    with replaced_forward(module, forward):
        yield


def _giver(sink: Sink, sample: int) -> Callable[[Tensor], None]:
    def give(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        matrix = gradient.reshape(1, -1, gradient.shape[-1] if gradient.ndim else 1)
        index = torch.arange(matrix.shape[1], device=matrix.device).unsqueeze(0)
        owner = torch.full((1,), sample, device=matrix.device)
        with torch.no_grad():
            sink.give(Term(matrix, OneHot(index, matrix.shape[1]), owner))

    return give


class _Cutter:
    """One sample's part of a call's arguments; what the batch shares stays as it is."""

    def __init__(self, rows: Rows, sample: int) -> None:
        self._rows, self._sample = rows, sample
        self.used = False

    def cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return {key: self.cut(entry) for key, entry in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.cut(entry) for entry in value))
        if isinstance(value, list | tuple):
            return type(value)(self.cut(entry) for entry in value)
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        size, tokens = self._rows.size, self._rows.tokens
        whole_batch = value.shape[:1] == (size,)
        if whole_batch and (value.ndim >= 3 or value.shape == (size, tokens)):
            self.used = True
            return value[self._sample : self._sample + 1]
        if value.ndim == 2 and value.shape[0] == size * tokens:
            self.used = True
            return value[self._sample * tokens : (self._sample + 1) * tokens]
        return value


def _joined(module: nn.Module, rows: Rows, outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        # One row a sample, or its tokens flattened as they came.
        if first.ndim >= 1 and (first.shape[0] == 1 or first.shape[:-1] == (rows.tokens,)):
            return torch.cat(list(outputs))
        if first.shape == (rows.tokens,):
            return torch.cat(list(outputs))
        raise RowsError(module, f"seen to return shape {tuple(first.shape)} for one sample")
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_joined(module, rows, e) for e in zip(*outputs, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(_joined(module, rows, e) for e in zip(*outputs, strict=True))
    if first is None:
        return None
    raise RowsError(module, f"seen to return {type(first).__name__}; expected tensors")


BY_SAMPLE = Rule(name="autograd by sample", present=_presentations, attach=_attach)
