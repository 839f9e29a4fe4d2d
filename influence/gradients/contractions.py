"""Norms and inner products of per-sample gradients G_i = D_i' X_i, from the factors alone.

Two forms give the same numbers. `pair` never forms G_i:

    |G_i|^2 = sum over token pairs of (D_i D_i') * (X_i X_i'),   <G_i, T> = sum of (D_i T) * X_i.

`formed` makes G_i for a few samples at a time and drops it. `cheaper_form` counts the operations of
a norm alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Form = Literal["pair", "formed"]

TRANSIENT_BYTES = 64 * 2**20
"""Bound on what a layer holds for a chunk of samples (one sample at least)."""


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or higher: half precision would lose the small token gradients' sums."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cheaper_form(tokens: int, out_features: int, in_features: int) -> Form:
    """The form with fewer multiplications per sample for a norm alone."""
    size = out_features * in_features
    return "pair" if tokens**2 * (out_features + in_features) < (tokens + 1) * size else "formed"


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of `rows` samples that keep `row_bytes` each within TRANSIENT_BYTES."""
    step = max(1, TRANSIENT_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def formed_gradients(
    x: Float[Tensor, "b t in"], d: Float[Tensor, "b t out"]
) -> Iterator[tuple[slice, Float[Tensor, "c out in"]]]:
    """(rows, their G_i) for a few samples at a time."""
    row_bytes = x.shape[2] * d.shape[2] * x.element_size()
    for rows in chunks(x.shape[0], row_bytes):
        yield rows, torch.bmm(d[rows].mT, x[rows])


def pair_squared_norms(
    x: Float[Tensor, "b t in"], d: Float[Tensor, "b t out"]
) -> Float[Tensor, " b"]:
    """|G_i|^2 over token pairs, in float64; at least 0, as it is but for rounding."""
    parts = []
    for rows in chunks(x.shape[0], 2 * x.shape[1] ** 2 * x.element_size()):
        gram = torch.bmm(d[rows], d[rows].mT).mul_(torch.bmm(x[rows], x[rows].mT))
        parts.append(gram.sum((1, 2), dtype=torch.float64))
    return torch.cat(parts).clamp_min(0)


def pair_products(
    x: Float[Tensor, "b t in"],
    d: Float[Tensor, "b t out"],
    targets: Float[Tensor, "m out in"],
) -> Float[Tensor, "b m"]:
    """<G_i, T_k> over tokens, in float64."""
    columns = []
    for target in targets:
        columns.append(torch.matmul(d, target).mul_(x).sum((1, 2), dtype=torch.float64))
    return torch.stack(columns, dim=1)


def formed_squared_norms(gradients: Float[Tensor, "c out in"]) -> Float[Tensor, " c"]:
    """|G_i|^2 of formed gradients, in float64 across the rows of G_i.

    A float32 sum over all of G_i at once is off by 5e-5 of a norm for a layer of a million weights.
    """
    return torch.linalg.vector_norm(gradients, dim=2).double().square().sum(1)


def formed_products(
    gradients: Float[Tensor, "c out in"], targets: Float[Tensor, "m out in"]
) -> Float[Tensor, "c m"]:
    """<G_i, T_k> of formed gradients, in float64 across the rows of G_i (as cheap as without)."""
    by_row = torch.einsum("coi,moi->ocm", gradients, targets)
    return by_row.sum(0, dtype=torch.float64)
