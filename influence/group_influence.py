"""What it does to a target's loss to leave a whole group of rows out of the training.

The sum of the members' influences ignores that the others have another curvature. The second-order
correction (Basu, You and Feizi, ICML 2020) takes in what the group's own Hessian does: with p the
group's share of the n rows, g its mean gradient, H and H_U the Hessians of all rows and of the
group's, and v the target's gradient, the optimum without the group is to second order

    theta + step + p/(1-p) (H^-1 H_U - I) step,     step = p/(1-p) H^-1 g

where third derivatives are left out, and the target's loss changes by v' times the difference. The
correction grows with p and with how much of the curvature is the group's own.

`group_influence` takes H^-1 and H_U as functions, for any H whose inverse is known;
`datainf_group_influence` is the same in DataInf's terms, for `influence evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

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
    _check_size(len(group), n)
    share = len(group) / n
    odds = share / (1 - share)
    one = solve(group.mean(dim=0, keepdim=True))  # H^-1 g
    step = odds * one
    correction = odds * (solve(curvature(step)) - step)
    members = share * (targets @ one[0])
    first = targets @ step[0]
    return GroupInfluence(members, first, first + targets @ correction[0])


def datainf_group_influence(
    targets: Float[Tensor, "m d"],
    products: Float[Tensor, "m d"],
    mean: Float[Tensor, " d"],
    own: Float[Tensor, " d"],
    size: int,
    n: int,
) -> GroupInfluence:
    """With DataInf's averages of inverses: of all rows for H^-1, of the group's for H_U^-1.

    The inverse for the rows that are left is the average of theirs, (H^-1 - p H_U^-1) / (1-p), so
    that the correction takes no product of an inverse and a Hessian: DataInf's is none of its
    Hessian, and p/(1-p) (H^-1 H_U - I) would be far too large. Both are the same to first order in
    what tells H_U from H.

    products: H^-1 v of the targets v; mean: g, the group's mean gradient; own: H_U^-1 g.
    """
    _check_size(size, n)
    share = size / n
    odds = share / (1 - share)
    whole = products @ mean  # v'H^-1 g
    first = odds * whole
    return GroupInfluence(share * whole, first, first + odds**2 * (whole - targets @ own))


def _check_size(size: int, n: int) -> None:
    if not 0 < size < n:
        raise ValueError(f"a group of {size} of {n} rows; expected fewer than all, and one")
