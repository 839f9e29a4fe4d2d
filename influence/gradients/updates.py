"""Projections of a function of each sample's gradient, entry by entry, instead of the gradient.

The engine hands formed gradients over layer by layer; they are turned into AdamW's update here
before the projection proper sees them, since that update is not linear in the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from influence.adam_update import LayerMoments, adam_update
from influence.gradients.contractions import formed_gradients
from influence.gradients.layers import Layer
from influence.gradients.projected import Projection
from influence.gradients.term import Formed, Term, wide_dtype


@dataclass(frozen=True)
class UpdateProjection:
    """What `inner` makes of AdamW's updates; a `Projection` of gradients to whoever uses it.

    A layer that some sample never reached (an expert) gives no gradient for it, and yet its
    momentum moves: so every row begins with the projected update of a gradient of zero, and each
    layer adds the difference to that.

    Raises KeyError for a layer without moments.
    """

    inner: Projection
    moments: Mapping[str, LayerMoments]
    takes_factors: bool = False
    _at_rest: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _start: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        total = self.inner.accumulator(1)
        for name, own in self.moments.items():
            zero = torch.zeros_like(own.exp_avg).unflatten(0, (own.parts, -1))
            rest = _update(zero, own, None)
            self._at_rest[name] = rest
            first = torch.zeros(own.parts, dtype=torch.int64, device=rest.device)
            whole = Formed(rest, slice(0, 1), None)
            if own.parts > 1:
                part = torch.arange(own.parts, device=rest.device)
                whole = Formed(rest, first, part)
            self.inner.add_formed(name, whole, total)
        self._start.append(total)

    @property
    def dim(self) -> int:
        return self.inner.dim

    def input_side(self, name: str) -> None:
        """An update needs the whole gradient."""
        del name

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """The projected update of a gradient of zero, in every row."""
        return self.inner.accumulator(rows) + self._start[0]

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds what `add_formed` does of D' X; the term has to be the layer's only one."""
        for formed in formed_gradients([term]):
            self.add_formed(name, formed, total)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of what these (whole) gradients change of the update."""
        rest, own = self._at_rest[name], self.moments[name]
        update = _update(formed.gradients, own, formed.part)
        update -= rest if formed.part is None else rest[formed.part]
        self.inner.add_formed(name, Formed(update, formed.sample, formed.part), total)


def _update(
    gradients: Float[Tensor, "c out in"], own: LayerMoments, part: Tensor | None
) -> Float[Tensor, "c out in"]:
    """The updates by some gradients: of part 0, of these parts, or of all of them in order."""
    first, second = (
        each.to(gradients.dtype).unflatten(0, (own.parts, -1))
        for each in (own.exp_avg, own.exp_avg_sq)
    )
    if part is not None:
        first, second = first[part], second[part]
    return adam_update(
        gradients, first, second, step=own.step, beta1=own.beta1, beta2=own.beta2, eps=own.eps
    )


@dataclass(frozen=True)
class Flat:
    """No projection: the layers' gradients side by side, in their order, each row-major."""

    layers: Sequence[Layer]
    takes_factors: bool = False
    _places: dict[str, slice] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        start = 0
        for layer in self.layers:
            self._places[layer.name] = slice(start, start + layer.size)
            start += layer.size

    @property
    def dim(self) -> int:
        return sum(layer.size for layer in self.layers)

    def input_side(self, name: str) -> None:
        """It keeps whole gradients."""
        del name

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros, as wide as the sums of the layers' precision."""
        weight = self.layers[0].parameter
        return torch.zeros(rows, self.dim, dtype=wide_dtype(weight.dtype), device=weight.device)

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds D' X in the layer's place."""
        for formed in formed_gradients([term]):
            self.add_formed(name, formed, total)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds formed gradients in the layer's place."""
        own, flat = total[:, self._places[name]], formed.gradients.flatten(1)
        if formed.part is None:
            formed.add_by_sample(own, flat.to(own.dtype))
            return
        blocks = own.unflatten(1, (-1, flat.shape[1]))
        blocks[formed.sample, formed.part] += flat.to(own.dtype)
