"""Norms and inner products of per-sample gradients G_i = D_i' X_i, from the factors alone.

Two forms give the same numbers. `pair` never forms G_i:

    |G_i|^2 = sum over token pairs of (D_i D_i') * (X_i X_i'),   <G_i, T> = sum of (D_i T) * X_i.

`formed` makes G_i for a few samples at a time and drops it. `cheaper_form` counts the operations of
a norm alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from influence.gradients.term import Formed, Left, OneHot, Term, part_runs

Form = Literal["pair", "formed"]

TRANSIENT_BYTES = 64 * 2**20
"""Bound on what a layer holds for a chunk of samples (one sample at least)."""

_WIDE = (torch.float32, torch.float64)

PAIR_BLOCK = 128
"""Tokens of a block of token pairs; the pairs below the diagonal are those above it once more."""


def wide(term: Term) -> Term:
    """`term` in float32 or higher: half precision would lose the small token gradients' sums."""

    def widened(x: Tensor) -> Tensor:
        return x if x.dtype in _WIDE else x.float()

    if term.x.dtype in _WIDE and (isinstance(term.d, OneHot) or term.d.dtype in _WIDE):
        return term
    d = term.d if isinstance(term.d, OneHot) else widened(term.d)
    return replace(term, x=widened(term.x), d=d)


def cheaper_form(tokens: int, out_features: int, in_features: int) -> Form:
    """The form with fewer multiplications per sample for a norm alone."""
    size = out_features * in_features
    blocks = -(-tokens // PAIR_BLOCK)
    pairs = tokens**2 * (blocks + 1) / (2 * blocks)
    return "pair" if pairs * (out_features + in_features) < (tokens + 1) * size else "formed"


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of `rows` samples that keep `row_bytes` each within TRANSIENT_BYTES."""
    step = max(1, TRANSIENT_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


# --- pairs of tokens ---


def squared_norms(terms: Sequence[Term], size: int) -> Float[Tensor, " b"]:
    """|G_i|^2 of `size` samples over token pairs, in float64; rounding never makes it negative.

    Several whole terms of one parameter (see `merged`) are added up before they are squared.
    """
    total = torch.zeros(size, dtype=torch.float64, device=terms[0].x.device)
    for place, first in enumerate(terms):
        first.add_by_sample(total, _self_products(first))
        for second in terms[place + 1 :] if first.whole else ():
            total += 2 * _pair_sums(first, second)
    return total.clamp_min_(0)


def _self_products(term: Term) -> Float[Tensor, " g"]:
    """|D_k' X_k|^2 of every group."""
    tokens = term.x.shape[1]
    edges = [slice(s, min(s + PAIR_BLOCK, tokens)) for s in range(0, tokens, PAIR_BLOCK)]
    total = torch.zeros(len(term.x), dtype=torch.float64, device=term.x.device)
    for place, first in enumerate(edges):
        here = _token_rows(term, first)
        total += _pair_sums(here, here)
        if place + 1 < len(edges):
            # All later tokens in one product.
            later = _token_rows(term, slice(first.stop, tokens))
            total += 2 * _pair_sums(here, later)
    return total


def _token_rows(term: Term, tokens: slice) -> Term:
    d = term.d
    part = replace(d, index=d.index[:, tokens]) if isinstance(d, OneHot) else d[:, tokens]
    return Term(term.x[:, tokens], part)


def _pair_sums(first: Term, second: Term) -> Float[Tensor, " g"]:
    """Sum over the pairs of a token of each of the two terms, group by group."""
    parts = []
    pair_bytes = 2 * first.x.shape[1] * second.x.shape[1] * first.x.element_size()
    for rows in chunks(len(first.x), pair_bytes):
        gram = torch.bmm(first.x[rows], second.x[rows].mT)
        gram = _left_gram(_left_rows(first.d, rows), _left_rows(second.d, rows), gram)
        parts.append(gram.sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _left_rows(d: Left, rows: slice) -> Left:
    return replace(d, index=d.index[rows]) if isinstance(d, OneHot) else d[rows]


def _left_gram(
    first: Left, second: Left, weights: Float[Tensor, "g s t"]
) -> Float[Tensor, "g s t"]:
    """(first second') * weights, where either may be one-hot."""
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        return weights * (first.index.unsqueeze(2) == second.index.unsqueeze(1))
    if isinstance(first, OneHot) or isinstance(second, OneHot):
        dense, hot = (second, first) if isinstance(first, OneHot) else (first, second)
        assert isinstance(dense, Tensor)
        assert isinstance(hot, OneHot)
        index = hot.index.unsqueeze(1).expand(-1, dense.shape[1], -1)
        gram = dense.gather(2, index)
        return weights * (gram.mT if isinstance(first, OneHot) else gram)
    return weights.mul_(torch.bmm(first, second.mT))


def pair_products(
    term: Term, targets: Float[Tensor, "m rows in"], parts: int, size: int
) -> Float[Tensor, "b m"]:
    """<G_i, T_k> over tokens, in float64; a target has the layer's `parts` below each other."""
    total = torch.zeros(size, len(targets), dtype=torch.float64, device=term.x.device)
    for column, target in enumerate(targets):
        blocks = target.view(parts, -1, target.shape[1])
        if term.part is None:
            values = (_times(term.d, blocks[0]) * term.x).sum((1, 2), dtype=torch.float64)
        else:
            values = torch.cat(
                [
                    (_times(_left_rows(term.d, rows), blocks[part]) * term.x[rows]).sum(
                        (1, 2), dtype=torch.float64
                    )
                    for part, rows in part_runs(term.part)
                ]
            )
        term.add_by_sample(total[:, column], values)
    return total


def _times(d: Left, target: Float[Tensor, "out in"]) -> Float[Tensor, "g t in"]:
    return target[d.index] if isinstance(d, OneHot) else torch.matmul(d, target)


# --- formed gradients ---


def formed_gradients(terms: Sequence[Term]) -> Iterator[Formed]:
    """The gradients of a few groups at a time; whole terms are added up."""
    first, others = terms[0], terms[1:]
    if others and not first.whole:
        for term in terms:
            yield from formed_gradients([term])
        return
    out = first.d.width if isinstance(first.d, OneHot) else first.d.shape[2]
    row_bytes = first.x.shape[2] * out * first.x.element_size()
    for rows in chunks(len(first.x), row_bytes):
        gradients = _form(first.rows(rows), out)
        for other in others:
            gradients += _form(other.rows(rows), out)
        sample = rows if first.sample is None else first.sample[rows]
        yield Formed(gradients, sample, None if first.part is None else first.part[rows])


def _form(term: Term, out: int) -> Float[Tensor, "c out in"]:
    if isinstance(term.d, Tensor):
        return torch.bmm(term.d.mT, term.x)
    total = term.x.new_zeros(len(term.x), out, term.x.shape[2])
    index = term.d.index.unsqueeze(2).expand(-1, -1, term.x.shape[2])
    return total.scatter_add_(1, index, term.x)


def formed_squared_norms(gradients: Float[Tensor, "c out in"]) -> Float[Tensor, " c"]:
    """|G_i|^2 of formed gradients, in float64 across the rows of G_i.

    A float32 sum over all of G_i at once is off by 5e-5 of a norm for a layer of a million weights.
    """
    return torch.linalg.vector_norm(gradients, dim=2).double().square().sum(1)


def formed_products(formed: Formed, targets: Float[Tensor, "m rows in"]) -> Float[Tensor, "c m"]:
    """<G_i, T_k> of formed gradients, in float64 across the rows of G_i (as cheap as without)."""
    gradients = formed.gradients
    if formed.part is None:
        by_row = torch.einsum("coi,moi->ocm", gradients, targets)
        return by_row.sum(0, dtype=torch.float64)
    blocks = targets.view(len(targets), -1, *gradients.shape[1:])
    return torch.cat(
        [
            torch.einsum("coi,moi->ocm", gradients[rows], blocks[:, part]).sum(
                0, dtype=torch.float64
            )
            for part, rows in part_runs(formed.part)
        ]
    )
