"""How far DataInf is from (G'G/n + damping I)^-1 of every layer, formed exactly.

For a number of rows that fits into memory; measured by the evaluation `exact_inverse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.datainf import DAMPING, LayerBlock, SquaredNorms, datainf, influences
from influence.sketch_noise import is_constant, rank_correlation


class LayerDistance(NamedTuple):
    """DataInf's H^-1 v against the exact one: means over targets of |difference| / |exact|, and of
    the cosine between the two."""

    name: str
    relative: float
    cosine: float


class InverseDistance(NamedTuple):
    """`layers` (those with gradients), and of the influences of all rows by the two: mean Spearman
    over targets (None where one of them is constant) and the factor that DataInf's are too large
    by."""

    layers: list[LayerDistance]
    spearman: float | None
    scale: float


def exact_inverse_products(
    gradients: Float[Tensor, "n d"], targets: Float[Tensor, "m d"], damping: float
) -> Float[Tensor, "m d"]:
    """(G'G/n + damping I)^-1 v of one layer, in float64; through the n x n matrix where d > n."""
    G, V = gradients.double(), targets.double()
    n, d = G.shape
    if damping == 0:
        return torch.zeros_like(V)
    if d <= n:
        curvature = G.T @ G / n
        curvature.diagonal().add_(damping)
        return torch.linalg.solve(curvature, V.T).T
    # (G'G/n + c I)^-1 = (I - G'(n c I + G G')^-1 G) / c
    gram = G @ G.T
    gram.diagonal().add_(n * damping)
    return (V - torch.linalg.solve(gram, G @ V.T).T @ G) / damping


def inverse_distance(
    gradients: Float[Tensor, "n d"],
    norms: Float[Tensor, "n layers"],
    targets: Float[Tensor, "m d"],
    blocks: Sequence[LayerBlock],
    share: float = DAMPING,
) -> InverseDistance:
    """DataInf against the exact inverse with the same dampings, by layer and in the influences."""
    squares = SquaredNorms(len(blocks))
    squares.add(norms)
    damping = squares.damping(blocks, share).tolist()
    found = datainf(lambda: [(gradients, norms)], targets, blocks, share)
    by_datainf = torch.zeros(len(gradients), len(targets), dtype=torch.float64)
    by_exact = torch.zeros_like(by_datainf)
    layers = []
    for block, value in zip(blocks, damping, strict=True):
        if value == 0:
            continue  # its gradients are all zero
        # One layer at a time is held in float64.
        rows = gradients[:, block.span].double()
        exact = exact_inverse_products(rows, targets[:, block.span], value)
        layers.append(_distance(block.name, found[:, block.span], exact))
        by_datainf += influences(rows, found[:, block.span])
        by_exact += influences(rows, exact)
    ranks = [
        rank_correlation(a.numpy(), b.numpy())
        for a, b in zip(by_datainf.T.cpu(), by_exact.T.cpu(), strict=True)
        if not (is_constant(a.numpy()) or is_constant(b.numpy()))
    ]
    scale = float((by_datainf * by_exact).sum() / by_exact.square().sum().clamp_min(1e-300))
    return InverseDistance(layers, sum(ranks) / len(ranks) if ranks else None, scale)


def _distance(name: str, found: Float[Tensor, "m d"], exact: Float[Tensor, "m d"]) -> LayerDistance:
    size = exact.norm(dim=1).clamp_min(1e-300)
    relative = ((found - exact).norm(dim=1) / size).mean()
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=1).mean()
    return LayerDistance(name, float(relative), float(cosine))
