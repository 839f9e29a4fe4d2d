"""Layers, gradients that have something in common, and their projections."""

from __future__ import annotations

import torch

from influence.gradients.term import Formed
from influence.projection import LayerShape, make_projection

# Two layers have a side small enough for kronecker to keep exactly; the last is a stack of three.
LAYERS = [
    LayerShape("a", 12, 20),
    LayerShape("b", 17, 9),
    LayerShape("c", 2, 15),
    LayerShape("d", 3, 2),
    LayerShape("e", 6, 5, parts=3),
]


def projector(kind: str, layers=LAYERS, **options):
    return make_projection(kind, layers, dtype=torch.float64, **options)


def gradients(rows: int, layers=LAYERS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients (rows, parts, out, in) that share something: inner products are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for layer in layers:
        shape = (layer.parts, layer.out, layer.in_)
        common = torch.randn(shape, generator=generator, dtype=torch.float64)
        own = torch.randn((rows, *shape), generator=generator, dtype=torch.float64)
        result[layer.name] = common + own
    return result


def projected(projection, values: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = len(next(iter(values.values())))
    vectors = projection.accumulator(rows)
    for name, gradient in values.items():
        samples = torch.arange(rows)
        for part in range(gradient.shape[1]):
            number = torch.full((rows,), part) if gradient.shape[1] > 1 else None
            projection.add_formed(name, Formed(gradient[:, part], samples, number), vectors)
    return vectors


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten(1) for gradient in values.values()], dim=1)
