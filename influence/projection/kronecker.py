"""The two-sided (Kronecker) projection P_out' G P_in of each layer, then a second sketch.

The second one adds the blocks of all layers up in `dim` slots with random signs: a CountSketch
(Charikar, Chen and Farach-Colton 2002; Weinberger et al., arXiv 0902.2206) whose slots are drawn
without replacement within a block, which takes the collisions inside a layer away and makes every
sum independent of the order of its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from influence.gradients.term import Formed, OneHot, Term, part_runs
from influence.projection.halves import HALVES, LayerShape, check_distinct, check_even
from influence.projection.randomness import places, signs
from influence.projection.side import Side, make_side


@dataclass(frozen=True)
class _LayerMap:
    """One layer's randomness; a side that is None is kept as it is (the identity).

    `slots` and `factors` are the second sketch, half by half: where each number of a part's
    projected block goes, and what it is multiplied by.
    """

    out_side: Side | None
    in_side: Side | None
    slots: Int[Tensor, "parts halves size"]
    factors: Float[Tensor, "parts halves size"]


@dataclass(frozen=True)
class KroneckerProjection:
    """A half projects each layer to about side/2 numbers a side (see `Side`) and adds the blocks up
    in dim/2 slots with random signs. Make one with `make_kronecker`."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    maps: dict[str, _LayerMap]
    takes_factors: bool = True

    def input_side(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What projects a layer's inputs; None where that side is kept as it is."""
        side = self.maps[name].in_side
        return None if side is None else partial(self._project, side)

    def _project(self, side: Side, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows halves_r"]:
        return side.project(x.to(self.dtype))

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that each layer's part is added to."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of D' X, without forming it."""
        layer = self.maps[name]
        x = term.x.to(self.dtype)
        right = _halves_apart(x) if term.sketched else _project_rows(x, layer.in_side)
        left = _project_left(term.d, layer.out_side, self.dtype)
        self._scatter(layer, _inner(left, right), term.sample, term.part, total)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of formed gradients: the same map."""
        layer = self.maps[name]
        block = formed.gradients.to(self.dtype).unsqueeze(1)
        if layer.in_side is not None:
            block = torch.matmul(block, _by_half(layer.in_side.matrix()))
        if layer.out_side is not None:
            block = torch.matmul(_by_half(layer.out_side.matrix()).mT, block)
        self._scatter(layer, block, formed.sample, formed.part, total)

    def _scatter(
        self,
        layer: _LayerMap,
        block: Float[Tensor, "g halves s r"],
        sample: slice | Tensor | None,
        part: Tensor | None,
        total: Float[Tensor, "b dim"],
    ) -> None:
        flat = block.flatten(2)
        if block.shape[1] < HALVES:
            flat = flat.expand(-1, HALVES, -1)  # both sides are kept: one block for both halves
        if part is None:
            self._add(layer, 0, flat, sample, total)
            return
        assert isinstance(sample, Tensor)
        for number, rows in part_runs(part):
            self._add(layer, number, flat[rows], sample[rows], total)

    def _add(
        self,
        layer: _LayerMap,
        part: int,
        flat: Float[Tensor, "g halves size"],
        sample: slice | Tensor | None,
        total: Float[Tensor, "b dim"],
    ) -> None:
        slots = self.dim // HALVES
        for start in range(0, flat.shape[2], slots):
            # Distinct slots within a run, so that every sum has one order.
            run = slice(start, start + slots)
            index = layer.slots[part, :, run].flatten()
            addend = (flat[:, :, run] * layer.factors[part, :, run]).flatten(1)
            if isinstance(sample, Tensor):
                total.index_put_((sample[:, None], index[None, :]), addend, accumulate=True)
            else:
                rows = total if sample is None else total[sample]
                rows.scatter_add_(1, index.expand(len(rows), -1), addend)


def _by_half(side: Float[Tensor, "d halves_s"]) -> Float[Tensor, "halves d s"]:
    return side.view(side.shape[0], HALVES, -1).transpose(0, 1)


def _project_left(
    d: Tensor | OneHot, side: Side | None, dtype: torch.dtype
) -> Float[Tensor, "g halves t s"]:
    if isinstance(d, Tensor):
        return _project_rows(d.to(dtype), side)
    if side is None:
        return F.one_hot(d.index, d.width).to(dtype).unsqueeze(1)
    return _halves_apart(side.rows(d.index))


def _project_rows(x: Float[Tensor, "g t d"], side: Side | None) -> Float[Tensor, "g halves t s"]:
    if side is None:
        return x.unsqueeze(1)
    return _halves_apart(side.project(x))


def _inner(
    left: Float[Tensor, "g halves t s"], right: Float[Tensor, "g halves t r"]
) -> Float[Tensor, "g halves s r"]:
    """The sums of outer products over the rows t of each group and half."""
    if len(left) == 1 and left.shape[1] == right.shape[1]:
        # Of the few products of a short row, what leads up to them is no small part.
        return torch.bmm(left[0].mT, right[0]).unsqueeze(0)
    return torch.matmul(left.mT, right)


def _halves_apart(projected: Float[Tensor, "g t halves_s"]) -> Float[Tensor, "g halves t s"]:
    return projected.view(*projected.shape[:2], HALVES, -1).transpose(1, 2)


def make_kronecker(
    layers: Sequence[LayerShape],
    *,
    side: int,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> KroneckerProjection:
    """The two-sided projection of these layers, to at most `dim` numbers a row.

    About `side` directions a side of a layer and `dim` slots, each shared by the two halves. A side
    of a layer that is no wider than its half of them is kept exactly. Where all blocks of a half
    together have at most dim/2 numbers there is no second sketch, and the result's `dim` is
    smaller. A layer's randomness depends on its name, not on the other layers; the parts of a layer
    share their directions, but
    not their slots and signs. Raises InputError for an odd or too small `side` or `dim`, or for a
    repeated layer name.
    """
    check_even(side=side, dim=dim)
    check_distinct(list(layers))
    directions = side // HALVES
    sides = {layer.name: _sides(layer, directions, seed, dtype, device) for layer in layers}
    sizes = [
        _kept(layer.out, sides[layer.name][0]) * _kept(layer.in_, sides[layer.name][1])
        for layer in layers
    ]
    whole = sum(size * layer.parts for size, layer in zip(sizes, layers, strict=True))
    slots = min(dim // HALVES, whole)
    scale = HALVES**-0.5
    maps: dict[str, _LayerMap] = {}
    offset = 0
    for layer, size in zip(layers, sizes, strict=True):
        shape = (layer.parts, HALVES, size)
        if slots == whole:
            count = layer.parts * size
            places_of = torch.arange(offset, offset + count).view(layer.parts, 1, size)
            index, factor = places_of.expand(shape), torch.full(shape, scale, dtype=torch.float64)
            offset += count
        else:
            index = torch.stack(
                [
                    torch.stack(
                        [places(size, slots, seed, layer.name, "slot", p, h) for h in range(HALVES)]
                    )
                    for p in range(layer.parts)
                ]
            )
            factor = signs(shape, seed, layer.name, "sign").double() * scale
        halves = torch.arange(HALVES).view(1, HALVES, 1) * slots
        maps[layer.name] = _LayerMap(
            *sides[layer.name], (index + halves).to(device), factor.to(device, dtype)
        )
    return KroneckerProjection(HALVES * slots, dtype, torch.device(device), maps)


def _sides(
    layer: LayerShape,
    directions: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Side | None, Side | None]:
    """What projects the outputs and the inputs of a layer."""
    return (
        make_side(layer.out, directions, (seed, layer.name, "out"), dtype, device),
        make_side(layer.in_, directions, (seed, layer.name, "in"), dtype, device),
    )


def _kept(width: int, side: Side | None) -> int:
    return width if side is None else side.directions
