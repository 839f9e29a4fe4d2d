"""The CountSketch of each layer's gradient, computed from its factors.

Charikar, Chen and Farach-Colton 2002; Weinberger et al., arXiv 0902.2206. Entry (o, i) of a
gradient goes to the bucket a(o) + b(i) mod k with the sign s(o) r(i). So the sketch of an outer
product is the circular convolution of its sides' sketches (TensorSketch, Pham and Pagh 2013), and a
sum of outer products over tokens is one sum in the frequency domain: the gradient is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.gradients.term import Formed, OneHot, Term
from influence.projection.halves import HALVES, LayerShape, check_distinct, check_even
from influence.projection.randomness import places, signs

TRANSIENT_NUMBERS = 16 * 2**20
"""Bound on the complex numbers that a chunk of groups holds (one group at least)."""


@dataclass(frozen=True)
class _Side:
    """Buckets and signs of one side of a layer, by half; for `out` every part has its own."""

    buckets: Int[Tensor, "halves d"]
    signs: Float[Tensor, "halves d"]


@dataclass(frozen=True)
class CountSketchProjection:
    """Two halves of dim/2 buckets each; see the module. Make one with `make_countsketch`."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    maps: dict[str, tuple[_Side, _Side]]
    takes_factors: bool = True

    def input_side(self, name: str) -> None:
        """Terms need a layer's inputs."""
        del name

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that each layer's part is added to."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds the sketch of D' X, without forming it."""
        out_side, in_side = self.maps[name]
        groups, tokens, _width = term.x.shape
        step = max(1, TRANSIENT_NUMBERS // (tokens * self.dim))
        for start in range(0, groups, step):
            few = term.rows(slice(start, start + step))
            columns = []
            for half in range(HALVES):
                right = self._spectrum(few.x.to(self.dtype), in_side, half)
                left = self._left_spectrum(few, out_side, half)
                summed = (left * right).sum(1)
                columns.append(torch.fft.irfft(summed, n=self.dim // HALVES))
            values = torch.cat(columns, dim=1) * HALVES**-0.5
            if few.sample is None:
                total[start : start + step] += values
            else:
                total.index_add_(0, few.sample, values)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds the sketch of formed gradients: rows of G are tokens with one output each."""
        count, out = formed.gradients.shape[:2]
        index = torch.arange(out, device=formed.gradients.device).expand(count, -1)
        sample = formed.sample
        if isinstance(sample, slice):
            sample = torch.arange(len(total), device=total.device)[sample]
        term = Term(formed.gradients, OneHot(index, out), sample, formed.part)
        self.add_term(name, term, total)

    def _spectrum(self, x: Float[Tensor, "g t d"], side: _Side, half: int) -> Tensor:
        slots = self.dim // HALVES
        spread = x.new_zeros(*x.shape[:2], slots)
        for start in range(0, x.shape[2], slots):
            # Distinct buckets within a run, so that every sum has one order.
            run = slice(start, start + slots)
            index = side.buckets[half, run].expand(*x.shape[:2], -1)
            spread.scatter_add_(2, index, x[:, :, run] * side.signs[half, run])
        return torch.fft.rfft(spread)

    def _left_spectrum(self, term: Term, side: _Side, half: int) -> Tensor:
        slots = self.dim // HALVES
        d = term.d
        width = d.width if isinstance(d, OneHot) else d.shape[2]
        first = torch.zeros(len(term.x), dtype=torch.long, device=term.x.device)
        if term.part is not None:
            first = term.part * width
        if isinstance(d, OneHot):
            row = d.index + first[:, None]
            spread = term.x.new_zeros(*d.index.shape, slots, dtype=self.dtype)
            value = side.signs[half][row].unsqueeze(2)
            return torch.fft.rfft(spread.scatter_(2, side.buckets[half][row].unsqueeze(2), value))
        if term.part is None:
            return self._spectrum(d.to(self.dtype), side, half)
        row = first[:, None] + torch.arange(width, device=first.device)
        spread = d.new_zeros(*d.shape[:2], slots, dtype=self.dtype)
        for start in range(0, width, slots):
            run = row[:, start : start + slots]
            index = side.buckets[half][run].unsqueeze(1).expand(-1, d.shape[1], -1)
            value = d[:, :, start : start + slots] * side.signs[half][run].unsqueeze(1)
            spread.scatter_add_(2, index, value.to(self.dtype))
        return torch.fft.rfft(spread)


def make_countsketch(
    layers: Sequence[LayerShape],
    *,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CountSketchProjection:
    """The CountSketch of these layers to `dim` numbers a row.

    Raises InputError for an odd `dim` or a repeated layer name.
    """
    check_even(dim=dim)
    check_distinct(list(layers))
    slots = dim // HALVES
    maps: dict[str, tuple[_Side, _Side]] = {}
    for layer in layers:
        maps[layer.name] = (
            _side(layer.parts, layer.out, slots, (seed, layer.name, "out"), dtype, device),
            _side(1, layer.in_, slots, (seed, layer.name, "in"), dtype, device),
        )
    return CountSketchProjection(dim, dtype, torch.device(device), maps)


def _side(
    parts: int,
    width: int,
    slots: int,
    purpose: tuple[object, ...],
    dtype: torch.dtype,
    device: torch.device | str,
) -> _Side:
    buckets = [
        torch.cat([places(width, slots, *purpose, "bucket", p, h) for p in range(parts)])
        for h in range(HALVES)
    ]
    flips = [signs((parts * width,), *purpose, "sign", h) for h in range(HALVES)]
    return _Side(torch.stack(buckets).to(device), torch.stack(flips).to(device, dtype))
