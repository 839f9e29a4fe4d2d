"""The form in which every parameter's per-sample gradient arrives: products of two factors.

A parameter's gradient is presented as `parts` matrices of (out, in). A term says

    gradient of part p for sample i = sum of D_k' X_k over the groups k with sample i and part p.

For a linear layer there is one group per sample: its tokens' inputs X and output gradients D. For a
bias or a norm's weight D is a column of ones, for an embedding D has a single one in each row, and
for a stack of experts a group is one sample's tokens in one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """Rows of an identity matrix of `width` columns: row (g, t) has its 1 at `index[g, t]`."""

    index: Int[Tensor, "g t"]
    width: int


Left = Float[Tensor, "g t out"] | OneHot


@dataclass(frozen=True)
class Term:
    """One summand of a layer's gradients, in g groups of t rows (padded with zeros).

    sample: the sample of every group; None: group k is sample k.
    part: the part of every group; None: part 0. No two groups of a term are of one sample and part.
    sketched: x is not the layer's input any more, but what a projection made of it during the
    forward pass (see `Projection.input_side`); only that projection can use such a term.
    """

    x: Float[Tensor, "g t in"]
    d: Left
    sample: Int[Tensor, " g"] | None = None
    part: Int[Tensor, " g"] | None = None
    sketched: bool = False

    @property
    def whole(self) -> bool:
        """Whether group k is sample k of one part."""
        return self.sample is None and self.part is None

    def as_sketched(self) -> Term:
        """The same, with an x that a projection has made."""
        return Term(self.x, self.d, self.sample, self.part, sketched=True)

    def rows(self, chosen: slice) -> Term:
        """The groups in `chosen`."""
        d = self.d
        return replace(
            self,
            x=self.x[chosen],
            d=replace(d, index=d.index[chosen]) if isinstance(d, OneHot) else d[chosen],
            sample=None if self.sample is None else self.sample[chosen],
            part=None if self.part is None else self.part[chosen],
        )

    def add_by_sample(self, total: Float[Tensor, "b ..."], values: Float[Tensor, "g ..."]) -> None:
        """Add the groups' values to their samples' entries of `total`."""
        if self.sample is None:
            total += values
        else:
            total.index_add_(0, self.sample, values)


@dataclass(frozen=True)
class Formed:
    """Gradients of a few groups; `sample` and `part` as in `Term`, but `sample` may be a slice."""

    gradients: Float[Tensor, "c out in"]
    sample: slice | Int[Tensor, " c"]
    part: Int[Tensor, " c"] | None

    def add_by_sample(self, total: Float[Tensor, "b ..."], values: Float[Tensor, "c ..."]) -> None:
        """Add the groups' values to their samples' entries of `total`."""
        if isinstance(self.sample, slice):
            total[self.sample] += values
        else:
            total.index_add_(0, self.sample, values)


def part_runs(part: Int[Tensor, " g"]) -> Iterator[tuple[int, slice]]:
    """(part, its groups), where the groups are in the order of their parts."""
    values, counts = torch.unique_consecutive(part, return_counts=True)
    start = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield value, slice(start, start + count)
        start += count


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which gradients are summed: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def summed_rows(x: Float[Tensor, "g t in"], sample: Tensor | None, part: Tensor | None) -> Term:
    """The term of a vector parameter whose gradient is the sum of x over its tokens."""
    total = x.sum(1, keepdim=True, dtype=wide_dtype(x.dtype))
    return Term(total, total.new_ones(len(total), 1, 1), sample, part)


def merged(terms: Sequence[Term]) -> list[Term]:
    """The same gradients in few terms: all of them `whole`, or none with a group of another's.

    Whole terms (a module called several times, a matrix that is both embedding and output head) add
    up sample by sample. Raises ValueError for groups of one sample and part in several other terms.
    """
    if len(terms) == 1:
        return list(terms)
    if all(term.whole for term in terms):
        dense = [term for term in terms if isinstance(term.d, Tensor)]
        others = [term for term in terms if isinstance(term.d, OneHot)]
        return [_side_by_side(group) for group in (dense, others) if group]
    terms = _stacked(terms)
    owners = torch.cat([_owners(term) for term in terms])
    if len(owners.unique(dim=0)) < len(owners):
        raise ValueError(
            "a layer that is run sample by sample, or a stack of experts, was called several times "
            "in one forward pass"
        )
    return terms


def _owners(term: Term) -> Int[Tensor, "g 2"]:
    """(sample, part) of every group."""
    count, device = len(term.x), term.x.device
    sample = torch.arange(count, device=device) if term.sample is None else term.sample
    part = torch.zeros_like(sample) if term.part is None else term.part
    return torch.stack([sample, part], dim=1)


def _stacked(terms: Sequence[Term]) -> list[Term]:
    """Terms of single samples below each other, where they are alike."""
    alike: dict[object, list[Term]] = {}
    for place, term in enumerate(terms):
        key: object = place
        if term.sample is not None and term.part is None:
            key = (tuple(term.x.shape[1:]), isinstance(term.d, OneHot))
        alike.setdefault(key, []).append(term)
    return [_below_each_other(group) for group in alike.values()]


def _below_each_other(terms: Sequence[Term]) -> Term:
    if len(terms) == 1:
        return terms[0]
    x = torch.cat([term.x for term in terms])
    sample = torch.cat([term.sample for term in terms if term.sample is not None])
    dense = [term.d for term in terms if isinstance(term.d, Tensor)]
    if dense:
        return replace(terms[0], x=x, d=torch.cat(dense), sample=sample)
    hot = [term.d for term in terms if isinstance(term.d, OneHot)]
    index = torch.cat([each.index for each in hot])
    return replace(terms[0], x=x, d=OneHot(index, hot[0].width), sample=sample)


def _side_by_side(terms: Sequence[Term]) -> Term:
    if len(terms) == 1:
        return terms[0]
    x = torch.cat([term.x for term in terms], dim=1)
    dense = [term.d for term in terms if isinstance(term.d, Tensor)]
    if dense:
        return replace(terms[0], x=x, d=torch.cat(dense, dim=1))
    hot = [term.d for term in terms if isinstance(term.d, OneHot)]
    index = torch.cat([each.index for each in hot], dim=1)
    return replace(terms[0], x=x, d=OneHot(index, hot[0].width))
