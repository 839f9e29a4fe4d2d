"""DataInf: influence through the average of every sample's own inverse, in streaming passes.

Kwon et al., arXiv 2310.00902. For a layer l with gradients g_i (of n candidates) and v (a target's
average gradient)

    damping = 0.1 mean_i(|g_i|^2 / D),   D the layer's unprojected size
    H^-1 v ~ (1/n) sum_i (1/damping) (v - (g_i'v / (damping + |g_i|^2)) g_i),
    influence(k) = -sum over layers of (H^-1 v)'g_k

which is the average of the inverses of damping I + g_i g_i', not the inverse of their average
(`influence.inverse_distance` measures how far apart the two are). Three passes over the rows, each
a few matrix products a block of them, for all targets at once, and in memory for m rows of targets:

    0. mean squared norms of every layer (`SquaredNorms`), which give the dampings;
    1. sum_i (g_i'v / (damping + |g_i|^2)) g_i (`CurvatureSums`), which gives H^-1 v;
    2. inner products with it (`influences`).

Gradients may be projected, layer by layer; norms and sizes are those of the whole ones. Inner
products of a projection are unbiased; the products of two of them in the sum of pass 1 come out too
large by about 1 / (length of the projected layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DAMPING = 0.1

Rows = tuple[Float[Tensor, "b d"], Float[Tensor, "b layers"]]
"""Gradients of some rows, layers side by side, and the norms of each layer's whole gradient."""


class LayerBlock(NamedTuple):
    """Where a layer's gradient lies in a row, and how many numbers it has unprojected."""

    name: str
    offset: int
    length: int
    size: int

    @property
    def span(self) -> slice:
        """Its columns."""
        return slice(self.offset, self.offset + self.length)


class SquaredNorms:
    """Pass 0: sums of every layer's squared norms, over rows that come in any portions."""

    def __init__(self, layers: int) -> None:
        self.rows = 0
        self.sums = torch.zeros(layers, dtype=torch.float64)

    def add(self, norms: Float[Tensor, "b layers"]) -> None:
        """Norms of further rows."""
        self.rows += len(norms)
        self.sums += norms.double().square().sum(0)

    def damping(
        self, blocks: Sequence[LayerBlock], share: float = DAMPING
    ) -> Float[Tensor, " layers"]:
        """share x mean of |g|^2 / D, by layer; 0 for a layer whose gradients are all zero."""
        sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
        return share * self.sums / (max(1, self.rows) * sizes)


class CurvatureSums:
    """Pass 1: the sum over rows of (g'v / (damping + |g|^2)) g, for every target and layer.

    Products are taken in the precision of `targets`, which the rows must have too, sums in float64.
    The sums of parts of the rows add up to those of all.
    """

    def __init__(
        self,
        targets: Float[Tensor, "m d"],
        blocks: Sequence[LayerBlock],
        damping: Float[Tensor, " layers"],
    ) -> None:
        self.rows = 0
        self.sums = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self._targets = targets
        self._blocks = list(blocks)
        self._damping = damping.tolist()

    def add(self, gradients: Float[Tensor, "b d"], norms: Float[Tensor, "b layers"]) -> None:
        """Further rows."""
        self.rows += len(gradients)
        squares = norms.double().square()
        for layer, (block, damping) in enumerate(zip(self._blocks, self._damping, strict=True)):
            if damping == 0:
                continue  # its gradients are all zero
            g = gradients[:, block.span]
            along = g @ self._targets[:, block.span].T
            # A float32 gradient's square may be too small for a float32.
            weights = (along.double() / (damping + squares[:, layer, None])).to(g.dtype)
            self.sums[:, block.span] += weights.T @ g


class GradientSums:
    """The plain sum of the rows, in float64; for a group's mean. As `CurvatureSums` otherwise."""

    def __init__(self, targets: Float[Tensor, "m d"]) -> None:
        self.rows = 0
        self.sums = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)

    def add(self, gradients: Float[Tensor, "b d"], norms: Float[Tensor, "b layers"]) -> None:
        """Further rows."""
        self.rows += len(gradients)
        self.sums += gradients.double().sum(0)


def inverse_products(
    targets: Float[Tensor, "m d"],
    sums: Float[Tensor, "m d"],
    rows: int,
    blocks: Sequence[LayerBlock],
    damping: Float[Tensor, " layers"],
) -> Float[Tensor, "m d"]:
    """H^-1 v of every target from the sums over `rows` rows, in float64.

    A layer without damping (all of its gradients are zero) takes part in no influence: 0.
    """
    products = targets.double() - sums / max(1, rows)
    for block, value in zip(blocks, damping.tolist(), strict=True):
        products[:, block.span] *= 1.0 / value if value > 0 else 0.0
    return products


def influences(
    gradients: Float[Tensor, "b d"], products: Float[Tensor, "m d"]
) -> Float[Tensor, "b m"]:
    """Pass 2: -(H^-1 v)'g. Negative: training on the row lowers the target's loss (a proponent)."""
    return -(gradients @ products.to(gradients.dtype).T)


def layer_influences(
    gradients: Float[Tensor, "b d"], products: Float[Tensor, "m d"], blocks: Sequence[LayerBlock]
) -> Float[Tensor, "b m layers"]:
    """Every layer's part of the influences; they add up to `influences`."""
    products = products.to(gradients.dtype)
    parts = [-(gradients[:, b.span] @ products[:, b.span].T) for b in blocks]
    return torch.stack(parts, dim=2)


def datainf(
    rows: Callable[[], Iterable[Rows]],
    targets: Float[Tensor, "m d"],
    blocks: Sequence[LayerBlock],
    share: float = DAMPING,
) -> Float[Tensor, "m d"]:
    """H^-1 v of all targets: passes 0 and 1 over rows that can be gone through twice."""
    squares = SquaredNorms(len(blocks))
    for _, norms in rows():
        squares.add(norms)
    damping = squares.damping(blocks, share)
    curvature = CurvatureSums(targets, blocks, damping)
    for gradients, norms in rows():
        curvature.add(gradients, norms)
    return inverse_products(targets, curvature.sums, curvature.rows, blocks, damping)


def layer_norms(
    gradients: Float[Tensor, "b d"], blocks: Sequence[LayerBlock]
) -> Float[Tensor, "b layers"]:
    """Norms of the layers of whole gradients, in float64."""
    return torch.stack(
        [torch.linalg.vector_norm(gradients[:, b.span].double(), dim=1) for b in blocks], dim=1
    )
