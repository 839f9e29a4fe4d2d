"""Gradients of fused expert tensors, (experts, out, in) or (experts, in, out).

The layout is that of transformers' experts interface: a module with `gate_up_proj` (or `up_proj`)
and `down_proj`, perhaps with biases, that is called with the tokens, the experts that each one is
sent to, and their weights. During the pass its forward is replaced by one that computes the same
and shows, for every expert, the tokens that reached it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from influence.gradients.linear import own_parameters
from influence.gradients.rule import (
    Presentation,
    Rows,
    RowsError,
    Rule,
    Sink,
    replaced_forward,
    tracked,
)
from influence.gradients.term import Term, part_runs, summed_rows

_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a stack of experts with the layout that transformers dispatches on."""
    own = own_parameters(module)
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    expected = {_first(module), "down_proj"}
    expected |= {f"{name}_bias" for name in expected} if module.has_bias else set()
    return set(own) == expected and own["down_proj"].ndim == 3


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _presentations(module: nn.Module) -> dict[str, Presentation]:
    found = {}
    for name, parameter in own_parameters(module).items():
        experts, *shape = parameter.shape
        if len(shape) == 1:
            found[name] = Presentation(experts, 1, shape[0])
        else:
            out, in_ = reversed(shape) if module.is_transposed else shape
            found[name] = Presentation(experts, out, in_, bool(module.is_transposed))
    return found


class _Routes:
    """Token-expert pairs sorted by expert, and within an expert by token, hence by sample."""

    def __init__(self, chosen: Int[Tensor, "n k"], experts: int, rows: Rows) -> None:
        self.top_k = chosen.shape[1]
        flat = chosen.reshape(-1)
        expert, self.order = torch.sort(flat, stable=True)
        self.token = self.order // self.top_k
        self.runs = list(part_runs(expert))
        if self.runs and self.runs[-1][0] >= experts:
            raise ValueError("expert parallelism is not supported")
        if rows.only is None:
            sample = self.token // rows.tokens
        else:
            sample = torch.full_like(self.token, rows.only)
        # One group per expert and sample.
        group = expert * rows.size + sample
        keys, inverse, counts = torch.unique_consecutive(
            group, return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[inverse]
        # Groups of like size side by side: padded to the longest of all, a few popular experts
        # would cost many times the rows that there are.
        sizes = torch.ceil(torch.log2(counts.double())).long()
        self.buckets = [
            _bucket(sizes == size, keys, counts, inverse, rank, rows.size)
            for size in sizes.unique().tolist()
        ]


@dataclass(frozen=True)
class _Bucket:
    """Groups of between 2^(k-1) and 2^k rows: which rows they are, and where in the grid."""

    rows: Int[Tensor, " r"]
    slots: Int[Tensor, " r"]
    longest: int
    sample: Int[Tensor, " g"]
    part: Int[Tensor, " g"]

    def grid(self, x: Float[Tensor, "s d"]) -> Float[Tensor, "g t d"]:
        """The rows of these groups, padded with zeros."""
        whole = x.new_zeros(len(self.sample) * self.longest, x.shape[1])
        whole.index_copy_(0, self.slots, x[self.rows])
        return whole.view(len(self.sample), self.longest, -1)


def _bucket(
    chosen: Bool[Tensor, " g"],
    keys: Int[Tensor, " g"],
    counts: Int[Tensor, " g"],
    group: Int[Tensor, " s"],
    rank: Int[Tensor, " s"],
    size: int,
) -> _Bucket:
    """The bucket of the chosen groups; `group` and `rank` place every row, `size` is the batch."""
    rows = chosen[group].nonzero().flatten()
    place = chosen.long().cumsum(0) - 1
    longest = int(counts[chosen].max())
    slots = place[group[rows]] * longest + rank[rows]
    return _Bucket(rows, slots, longest, keys[chosen] % size, keys[chosen] // size)


@contextmanager
def _attach(module: nn.Module, sinks: Mapping[str, Sink], rows: Rows) -> Iterator[None]:
    stack: Any = module

    def forward(
        hidden: Float[Tensor, "n h"], chosen: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]
    ) -> Float[Tensor, "n h"]:
        if rows.only is None and len(chosen) != rows.size * rows.tokens:
            why = f"called with {len(chosen)} tokens in a batch of {rows.size} x {rows.tokens}"
            raise RowsError(module, why)
        routes = _Routes(chosen, stack.num_experts, rows)
        inner = _linear(stack, sinks, routes, _first(stack), hidden[routes.token])
        inner = stack._apply_gate(inner) if stack.has_gate else stack.act_fn(inner)
        outer = _linear(stack, sinks, routes, "down_proj", inner)
        if stack.has_post_expert_norm:
            outer = stack.post_expert_norm(outer)
        outer = outer * weights.reshape(-1)[routes.order].unsqueeze(1)
        back = torch.empty_like(outer).index_copy(0, routes.order, outer)
        return back.view(*chosen.shape, -1).sum(1).to(hidden.dtype)

    with replaced_forward(module, forward):
        yield


def _linear(
    stack: Any, sinks: Mapping[str, Sink], routes: _Routes, name: str, x: Float[Tensor, "s in"]
) -> Float[Tensor, "s out"]:
    weight, bias = getattr(stack, name), getattr(stack, f"{name}_bias", None)
    parts = []
    for expert, run in routes.runs:
        matrix = weight[expert].mT if stack.is_transposed else weight[expert]
        parts.append(F.linear(x[run], matrix, None if bias is None else bias[expert]))
    output = torch.cat(parts)
    wanted = {key: sinks[key] for key in (name, f"{name}_bias") if key in sinks}
    if not wanted:
        return output
    held = [x.detach()]
    if not output.requires_grad:
        output = tracked(output)
    for sink in wanted.values():
        sink.expect()

    def after_backward(gradient: Tensor) -> None:
        with torch.no_grad():
            inputs = held.pop()
            grids = [(bucket, bucket.grid(gradient)) for bucket in routes.buckets]
            if name in wanted:
                wanted[name].give(*(Term(b.grid(inputs), d, b.sample, b.part) for b, d in grids))
            if f"{name}_bias" in wanted:
                wanted[f"{name}_bias"].give(*(summed_rows(d, b.sample, b.part) for b, d in grids))

    output.register_hook(after_backward)
    return output


EXPERTS = Rule(name="experts", present=_presentations, attach=_attach)
