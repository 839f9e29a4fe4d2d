"""What it does to a target's loss to leave a whole group of rows out of the training.

The sum of the members' influences ignores that the others have another curvature. The second-order
correction (Basu, You and Feizi, ICML 2020) takes in what the group's own Hessian does: with p the
group's share of the n rows, g its mean gradient, H and H_U the Hessians of all rows and of the
group's, and v the target's gradient, the optimum without the group is to second order

    theta + step + p/(1-p) (H^-1 H_U - I) step,     step = p/(1-p) H^-1 g

where third derivatives are left out, and the target's loss changes by v' times the difference. The
correction grows with p and with how much of the curvature is the group's own.

`solve` and `curvature` are functions, so that any H fits: the exact one of a convex model, or
DataInf's average of inverses with the group's empirical Fisher (`fisher_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from influence.datainf import LayerBlock, Rows, datainf

Linear = Callable[[Float[Tensor, "k d"]], Float[Tensor, "k d"]]


class GroupInfluence(NamedTuple):
    """Expected change of each target's loss when the group is left out: above 0 where it helped.

    members: sum of the members' own first-order effects, v'H^-1 g_k / n each; first: the same for
    the group as one, without which the others count n / (n - |U|) times as much; second: with the
    correction.
    """

    members: Float[Tensor, " m"]
    first: Float[Tensor, " m"]
    second: Float[Tensor, " m"]


def group_influence(
    targets: Float[Tensor, "m d"],
    group: Float[Tensor, "u d"],
    n: int,
    *,
    solve: Linear,
    curvature: Linear,
) -> GroupInfluence:
    """First and second order in the group's share of the n rows.

    group: gradients of its rows at the optimum of all. solve: H^-1 x for rows x; curvature: H_U x,
    the mean Hessian of the group's rows.
    """
    if not 0 < len(group) < n:
        raise ValueError(f"a group of {len(group)} of {n} rows; expected fewer than all, and one")
    share = len(group) / n
    odds = share / (1 - share)
    one = solve(group.mean(dim=0, keepdim=True))  # H^-1 g
    step = odds * one
    correction = odds * (solve(curvature(step)) - step)
    members = share * (targets @ one[0])
    first = targets @ step[0]
    return GroupInfluence(members, first, first + targets @ correction[0])


def fisher_of(group: Float[Tensor, "u d"]) -> Linear:
    """Products with the group's empirical Fisher matrix, the mean of g g'."""
    return lambda x: (x @ group.T) @ group / len(group)


def layered_fisher_of(group: Float[Tensor, "u d"], blocks: Sequence[LayerBlock]) -> Linear:
    """The same layer by layer, as DataInf has its curvature."""

    def products(x: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        found = torch.empty_like(x)
        for block in blocks:
            found[:, block.span] = fisher_of(group[:, block.span])(x[:, block.span])
        return found

    return products


def datainf_group_influence(
    rows: Callable[[], list[Rows]],
    targets: Float[Tensor, "m d"],
    group: Float[Tensor, "u d"],
    blocks: Sequence[LayerBlock],
    n: int,
) -> GroupInfluence:
    """With DataInf's average of inverses for H^-1 and empirical Fisher matrices, layer by layer.

    Two more runs of DataInf's passes over the rows; memory for the group and the targets.
    """

    def solve(x: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        return datainf(rows, x, blocks).to(x.dtype)

    return group_influence(
        targets, group, n, solve=solve, curvature=layered_fisher_of(group, blocks)
    )
