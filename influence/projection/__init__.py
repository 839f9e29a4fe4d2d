"""Seeded random projections that keep inner products: E<Px, Py> = <x, y>.

One interface (`influence.gradients.projected.Projection`), one file per kind. The projections of a
run's layers are independent and added up, so that each layer's share of an inner product is what it
is without projection; `layerwise` keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from influence.errors import InputError
from influence.gradients.projected import Projection
from influence.projection.countsketch import make_countsketch
from influence.projection.halves import HALVES, LayerShape, half_products, layer_shapes
from influence.projection.kronecker import KroneckerProjection, make_kronecker
from influence.projection.layerwise import LayerwiseProjection, make_layerwise
from influence.projection.rademacher import make_rademacher, rademacher_projection
from influence.projection.srht import make_srht

KINDS = ("kronecker", "srht", "rademacher", "countsketch")


def make_projection(
    kind: str,
    layers: Sequence[LayerShape],
    *,
    side: int,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Projection:
    """The projection of these layers under its name in the config; `side` is kronecker's alone."""
    if kind == "kronecker":
        return make_kronecker(layers, side=side, dim=dim, seed=seed, dtype=dtype, device=device)
    makers = {"srht": make_srht, "rademacher": make_rademacher, "countsketch": make_countsketch}
    if kind not in makers:
        raise InputError(f"gradients.projection: expected one of {', '.join(KINDS)}, got {kind!r}")
    return makers[kind](layers, dim=dim, seed=seed, dtype=dtype, device=device)


__all__ = [
    "HALVES",
    "KINDS",
    "KroneckerProjection",
    "LayerShape",
    "LayerwiseProjection",
    "Projection",
    "half_products",
    "layer_shapes",
    "make_countsketch",
    "make_kronecker",
    "make_layerwise",
    "make_projection",
    "make_rademacher",
    "make_srht",
    "rademacher_projection",
]
