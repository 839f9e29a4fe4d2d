"""How many members a selection misses, by a random sample of the rows that were left out.

The bound believes no model: rows are drawn at random within strata that were fixed before, and the
number of members in a stratum is bounded by the hypergeometric distribution of what the sample
found (the exact interval of Clopper and Pearson, for draws without replacement). A model only
says how to cut the strata and how to share the sample between them: were it wrong, the bound would
be looser, not false.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64

from influence.errors import InputError

# Cuts that are tried for the likelier stratum, as multiples of the sample's size.
_CUTS = (0.5, 1.0, 2.0, 4.0, 8.0)


class Stratum(NamedTuple):
    """Rows that are drawn alike: which, how many are drawn, and the bound's error probability."""

    rows: Int[np.ndarray, " n"]
    drawn: int
    error: float


class Found(NamedTuple):
    """What an audit of one stratum found: its size, the rows drawn, the members among them."""

    size: int
    drawn: int
    members: int
    error: float


def plan_audit(
    probability: Float[np.ndarray, " n"], audit: int, *, error: float = 0.05
) -> list[Stratum]:
    """One stratum, or a likelier and an unlikelier one: whichever promises the better bound.

    `probability` is what is believed of each row that it is a member. The promise is the bound that
    follows if every stratum holds as many members as believed. `audit` rows are drawn in all (all
    rows, if there are fewer). Rows are positions in `probability`.
    Raises InputError for an audit of no row.
    """
    if audit < 1:
        raise InputError(f"landmarks.audit: {audit} rows; expected 1 at least")
    order = np.argsort(-probability, kind="stable")
    audit = min(audit, len(order))
    plans = [[Stratum(np.sort(order), audit, error)]] if len(order) else []
    for cut in _CUTS:
        head = round(cut * audit)
        if 0 < head < len(order) and audit >= 2:
            plans.append(_two_strata(probability, order[:head], order[head:], audit, error))

    def promised(plan: list[Stratum]) -> float:
        expected = [
            Found(
                len(stratum.rows),
                stratum.drawn,
                round(float(probability[stratum.rows].mean()) * stratum.drawn),
                stratum.error,
            )
            for stratum in plan
        ]
        return missed_at_most(expected)

    return min(plans, key=promised, default=[])


def _two_strata(
    probability: Float[np.ndarray, " n"],
    head: Int[np.ndarray, " a"],
    tail: Int[np.ndarray, " b"],
    audit: int,
    error: float,
) -> list[Stratum]:
    """Neyman's allocation, and the error shared so that the sum of both bounds is least."""
    parts = [np.sort(head), np.sort(tail)]
    # A stratum without believed members still has a bound, of about 3 members in the sample.
    floor = 3.0 / audit
    share = [
        len(part)
        * np.sqrt(float(probability[part].mean()) * (1 - probability[part].mean()) + floor)
        for part in parts
    ]
    first = round(audit * share[0] / sum(share))
    first = min(max(first, 1, audit - len(tail)), audit - 1, len(head))
    drawn = [first, audit - first]
    # With none found a bound is N/n log(1/error): the sum is least for errors proportional to N/n.
    each = [len(part) / count for part, count in zip(parts, drawn, strict=True)]
    return [
        Stratum(part, count, error * ratio / sum(each))
        for part, count, ratio in zip(parts, drawn, each, strict=True)
    ]


def draw_sample(keys: UInt64[np.ndarray, " n"], stratum: Stratum) -> Int[np.ndarray, " drawn"]:
    """The stratum's rows with the smallest keys: uniform without replacement over seeds."""
    order = np.argsort(keys[stratum.rows], kind="stable")
    return np.sort(stratum.rows[order[: stratum.drawn]])


def missed_at_most(found: Sequence[Found]) -> int:
    """Members among the rows that were not drawn: at most so many, with the strata's errors' sum.

    In each stratum the largest number of members under which so few in the sample have a
    probability above the stratum's error, less those found.
    """
    return sum(_most_members(each) - each.members for each in found)


def _most_members(found: Found) -> int:
    """The largest M with P(members in the sample <= found | M in the stratum) > error."""
    from scipy.stats import hypergeom  # not above, as in `sketch_noise`

    low, high = found.members, found.size - (found.drawn - found.members)
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeom.cdf(found.members, found.size, middle, found.drawn) > found.error:
            low = middle
        else:
            high = middle - 1
    return low
