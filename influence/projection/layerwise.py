"""Every layer's gradient projected for itself, the results side by side instead of added up.

What needs a layer's own inner products (DataInf's curvature is one matrix a layer) can be computed
from such vectors. A layer of at most as many numbers as it may keep stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence.errors import InputError
from influence.gradients.contractions import formed_gradients
from influence.gradients.projected import Projection
from influence.gradients.term import Formed, Term
from influence.projection.countsketch import make_countsketch
from influence.projection.halves import LayerShape, check_distinct, check_even
from influence.projection.rademacher import make_rademacher
from influence.projection.srht import make_srht

_MAKERS: Mapping[str, Callable[..., Any]] = {
    "srht": make_srht,
    "rademacher": make_rademacher,
    "countsketch": make_countsketch,
}
SKETCHES = tuple(_MAKERS)


@dataclass(frozen=True)
class LayerwiseProjection:
    """A projection for each layer, each with its own columns. Make one with `make_layerwise`.

    `blocks` lists (name, offset, length) in the order of the layers. A projected layer's columns
    are two independent halves side by side; `sketches` has none for a layer that is kept whole.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device
    blocks: list[tuple[str, int, int]]
    sketches: dict[str, Projection]
    spans: dict[str, slice]
    takes_factors: bool

    def input_side(self, name: str) -> None:
        """Terms need a layer's inputs."""
        del name

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that each layer's part is added to."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of D' X, in the layer's own columns."""
        if name in self.sketches:
            self.sketches[name].add_term(name, term, total[:, self.spans[name]])
            return
        for formed in formed_gradients([term]):
            self.add_formed(name, formed, total)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of formed gradients, in the layer's own columns."""
        own = total[:, self.spans[name]]
        if name in self.sketches:
            self.sketches[name].add_formed(name, formed, own)
            return
        flat = formed.gradients.to(self.dtype).flatten(1)
        if formed.part is None:
            formed.add_by_sample(own, flat)
            return
        parts = own.unflatten(1, (-1, flat.shape[1]))
        assert isinstance(formed.sample, Tensor)  # groups of a stack of experts name their samples
        parts.index_put_((formed.sample, formed.part), flat, accumulate=True)


def make_layerwise(
    layers: Sequence[LayerShape],
    *,
    sketch: str,
    layer_dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LayerwiseProjection:
    """Project each layer of more than `layer_dim` numbers to that many, by the named projection.

    Raises InputError for an unknown `sketch`, an odd `layer_dim` or a repeated layer name.
    """
    if sketch not in _MAKERS:
        raise InputError(
            f"gradients.layer_sketch: expected one of {', '.join(SKETCHES)}, got {sketch!r}"
        )
    check_even(layer_dim=layer_dim)
    check_distinct(list(layers))
    blocks: list[tuple[str, int, int]] = []
    sketches: dict[str, Projection] = {}
    offset = 0
    for layer in layers:
        length = min(layer.size, layer_dim)
        if layer.size > layer_dim:
            sketches[layer.name] = _MAKERS[sketch](
                [layer], dim=layer_dim, seed=seed, dtype=dtype, device=device
            )
        blocks.append((layer.name, offset, length))
        offset += length
    return LayerwiseProjection(
        offset,
        dtype,
        torch.device(device),
        blocks,
        sketches,
        {name: slice(start, start + length) for name, start, length in blocks},
        takes_factors=sketch == "countsketch",
    )
