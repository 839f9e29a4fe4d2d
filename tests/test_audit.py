"""The audit's bound: against sums in full, over many draws, and against the selection rules."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from influence.audit import Found, Stratum, draw_sample, missed_at_most, plan_audit
from influence.budget import Budget
from influence.errors import InputError
from influence.membership import reaches
from influence.quotas import Quota
from influence.selection import Rule


def _slow_most(size: int, drawn: int, members: int, error: float) -> int:
    """The largest M that leaves a chance above `error` of so few members, by counting samples."""

    def chance(total: int) -> float:
        ways = sum(
            comb(total, found) * comb(size - total, drawn - found)
            for found in range(members + 1)
            if drawn - found <= size - total
        )
        return ways / comb(size, drawn)

    possible = range(members, size - (drawn - members) + 1)
    return max(total for total in possible if total == members or chance(total) > error)


@pytest.mark.parametrize(("size", "drawn"), [(30, 10), (25, 25), (41, 1)])
def test_the_bound_of_a_stratum_is_the_hypergeometric_one(size: int, drawn: int):
    for members in range(min(drawn, 6) + 1):
        found = missed_at_most([Found(size, drawn, members, 0.05)])
        assert found == _slow_most(size, drawn, members, 0.05) - members, (
            f"{members} members among {drawn} drawn of {size}: not the exact upper limit"
        )


@pytest.mark.parametrize("belief", ["right", "nothing", "wrong"])
def test_the_bound_holds_in_95_of_100_audits_whatever_was_believed(belief: str):
    draw = np.random.default_rng(0)
    n, audit, held, runs = 2000, 200, 0, 400
    for _ in range(runs):
        p = draw.beta(0.05, 2.0, size=n)
        member = draw.random(n) < p
        believed = {"right": p, "nothing": np.full(n, 0.01), "wrong": 1 - p}[belief]
        strata = plan_audit(believed, audit)
        keys = draw.integers(0, 2**63, n).astype(np.uint64)
        found, left = [], member.copy()
        for stratum in strata:
            sample = draw_sample(keys, stratum)
            left[sample] = False
            hits = int(member[sample].sum())
            found.append(Found(len(stratum.rows), stratum.drawn, hits, stratum.error))
        held += missed_at_most(found) >= left.sum()
    # 3.3 standard deviations of a binomial with 0.95 below its mean.
    assert held >= 0.95 * runs - 3.3 * np.sqrt(runs * 0.95 * 0.05), f"held in {held} of {runs}"


def test_strata_part_the_rows_and_share_sample_and_error():
    draw = np.random.default_rng(1)
    for n, audit in ((50, 20), (1000, 100), (20_000, 300), (10, 1), (10, 50)):
        strata = plan_audit(draw.beta(0.1, 3, size=n), audit)
        rows = np.concatenate([stratum.rows for stratum in strata])
        np.testing.assert_array_equal(np.sort(rows), np.arange(n))
        assert sum(stratum.drawn for stratum in strata) == min(audit, n)
        assert sum(stratum.error for stratum in strata) == pytest.approx(0.05)
        assert all(0 < stratum.drawn <= len(stratum.rows) for stratum in strata)


def test_likelier_rows_are_drawn_more_often_where_members_are_expected():
    p = np.concatenate([np.full(2000, 0.3), np.full(50_000, 1e-5)])
    strata = plan_audit(p, 2000)
    assert len(strata) == 2
    head, tail = strata
    assert head.drawn / len(head.rows) > 3 * tail.drawn / len(tail.rows)


def test_nothing_left_needs_no_audit():
    assert plan_audit(np.empty(0), 10) == []
    assert missed_at_most([]) == 0
    with pytest.raises(InputError, match=r"landmarks.audit: 0 rows"):
        plan_audit(np.ones(3), 0)


def test_every_row_of_a_stratum_is_drawn_equally_often():
    stratum = Stratum(np.arange(5, 17), 4, 0.05)
    count = np.zeros(20)
    for seed in range(3000):
        keys = np.random.default_rng(seed).integers(0, 2**63, 20).astype(np.uint64)
        count[draw_sample(keys, stratum)] += 1
    assert count[:5].sum() == count[17:].sum() == 0
    np.testing.assert_allclose(count[5:17] / 3000, 4 / 12, atol=0.04)


@pytest.mark.parametrize(
    ("combine", "quotas"),
    [("mean", False), ("max", False), ("round_robin", False), ("mean", True), ("max", True)],
)
def test_a_row_that_was_left_out_displaces_one_selected_row_at_most(combine: str, quotas: bool):
    """|S and T| >= k - M, on which the audit's bound stands; S sees some rows only."""
    draw = np.random.default_rng(2)
    for _ in range(150):
        n, m, k = 40, 3, 9
        P = draw.normal(size=(n, m)).round(1 if draw.random() < 0.3 else 6)
        seen = draw.random(n) < 0.6
        seen[:20] = True
        rule = Rule(
            np.array([0, 0, 1]),
            np.arange(n),
            Budget(rows=k),
            combine,
            sources=[("a", "b")[i % 2] for i in range(n)],
            per_source={"a": Quota(0.0, 0.5)} if quotas else None,
        )
        some = rule(np.where(seen[:, None], P, np.nan))
        truth = set(rule(P).order.tolist())
        over = int((reaches(rule, some, P, np.arange(n)) & ~seen).sum())
        kept = len(truth & set(some.order.tolist()))
        assert kept >= k - over, f"{over} rows that were left out displaced {k - kept}"
