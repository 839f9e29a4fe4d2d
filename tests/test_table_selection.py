"""A selection from blocks of a pool, against the one from all of its scores at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from influence.budget import Budget
from influence.errors import InputError
from influence.heads import read_heads
from influence.quotas import Quota
from influence.score_table import ArrayTable, OverlaidTable, rows_of, scored_rows
from influence.selection import Rule
from influence.table_selection import select_table

N = 3000


def pool(seed: int, kind: str, columns: int = 7) -> np.ndarray:
    """Scores with some rows without: independent, nearly equal columns, few values, or sorted."""
    draw = np.random.default_rng(seed)
    P = draw.normal(size=(N, columns))
    if kind == "alike":
        P = draw.normal(size=(N, 1)) + 0.01 * P
    if kind == "ties":
        P = np.round(P)
    if kind == "sorted":  # every block is better than all before it
        P = np.sort(P, axis=0)
    if kind == "constant":
        P[:, 1] = 0.5
    P[draw.random(N) < 0.1] = np.nan
    return P


def rule_of(
    combine: str, budget: Budget, *, quotas: dict[str, Quota] | None = None, columns: int = 7
) -> Rule:
    draw = np.random.default_rng(5)
    return Rule(
        np.arange(columns) // 3,
        draw.permutation(N),
        budget,
        combine,
        sources=[("a/x", "a/y", "b", "rare")[min(3, int(c))] for c in draw.exponential(1, N)],
        n_tokens=draw.integers(5, 300, N),
        per_source=quotas,
    )


def check(rule: Rule, P: np.ndarray, step: int) -> None:
    expected, found = rule(P), select_table(rule, ArrayTable(P, step=step))
    got = found.selection
    np.testing.assert_array_equal(got.order, expected.order, "other rows, or in another order")
    np.testing.assert_array_equal(got.column, expected.column)
    np.testing.assert_array_equal(got.score, expected.score)
    np.testing.assert_array_equal(got.tau, expected.tau, "a threshold is held by a row not seen")
    np.testing.assert_array_equal(got.weights, expected.weights, "weights depend on rows not taken")
    assert got.n_scored == expected.n_scored
    assert got.budget_exceeds_pool == expected.budget_exceeds_pool
    assert got.proponents == expected.proponents
    assert got.short_of_proponents == expected.short_of_proponents
    np.testing.assert_array_equal(found.P, P[found.rows])
    assert np.isin(got.order, found.rows).all()


@pytest.mark.parametrize("step", [10, 97, N])
@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
@pytest.mark.parametrize("kind", ["independent", "alike", "ties", "sorted", "constant"])
@pytest.mark.parametrize(
    "budget",
    [Budget(rows=1), Budget(rows=150), Budget(share=0.4), Budget(tokens=20_000), Budget(rows=N)],
    ids=str,
)
def test_it_is_the_selection_of_the_whole_pool(kind, combine, budget, step):
    check(rule_of(combine, budget), pool(1, kind), step)


@pytest.mark.parametrize("step", [97, N])
@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
@pytest.mark.parametrize("kind", ["independent", "ties", "sorted", "alike"])
@pytest.mark.parametrize("shift", [0.0, -1.0])
@pytest.mark.parametrize(
    "budget", [Budget(rows=150), Budget(proponents=0.5), Budget(tokens=20_000), Budget(rows=N)]
)
def test_it_is_the_selection_among_the_proponents_of_the_whole_pool(
    kind, combine, budget, step, shift
):
    P = pool(1, kind) + shift
    check(replace(rule_of(combine, budget), floor=0.0), P, step)


@pytest.mark.parametrize("combine", ["mean", "round_robin"])
@pytest.mark.parametrize(
    "quotas",
    [
        {"a/*": Quota(0.0, 0.3)},
        {"rare": Quota(0.2, 1.0), "a/*": Quota(0.1, 0.3)},
        {"b": Quota(0.0, 0.0), "rare": Quota(0.15, 0.15)},
    ],
    ids=["most", "least and most", "none and exactly"],
)
@pytest.mark.parametrize("kind", ["independent", "alike", "ties"])
def test_with_quotas(kind, combine, quotas):
    P = pool(2, kind)
    rule = rule_of(combine, Budget(rows=400), quotas=quotas)
    # Rows that the quotas want stand far down in every column.
    P[np.asarray([source == "rare" for source in rule.sources or ()])] -= 5.0
    check(rule, P, 211)


def test_a_head_holds_all_rows_down_to_its_bound_whatever_the_blocks():
    P = pool(3, "ties", columns=2)
    for step in (1, 13, 500, N):
        heads = read_heads(ArrayTable(P, step=step), lambda block: block, np.full((2, 1), 40))
        for c, (head,) in enumerate(heads):
            expected = np.flatnonzero(P[:, c] >= head.bound)
            np.testing.assert_array_equal(np.sort(head.positions), expected)
            assert 40 <= len(expected) < 1000
            assert not head.complete


def test_few_rows_are_kept_of_a_large_pool():
    """Independent columns: about twice the budget, not the pool."""
    P = pool(4, "independent")
    found = select_table(rule_of("round_robin", Budget(rows=200)), ArrayTable(P, step=100))
    assert len(found.rows) < 1000


def test_exact_rows_lie_over_predicted_ones():
    draw = np.random.default_rng(0)
    P, variance = draw.normal(size=(50, 2)), draw.random(50)
    positions, barred = np.array([3, 4, 20, 49]), np.array([0, 21])
    Y = draw.normal(size=(4, 2))
    expected, left = P.copy(), variance.copy()
    expected[positions], left[positions] = Y, 0.0
    expected[barred] = np.nan
    for step in (1, 7, 50):
        table = OverlaidTable(ArrayTable(P.copy(), variance, step), positions, Y, barred)
        found = rows_of(table, np.arange(50)[::-1])
        np.testing.assert_array_equal(found.P, expected[::-1])
        np.testing.assert_array_equal(found.variance, left[::-1])
        np.testing.assert_array_equal(np.flatnonzero(~scored_rows(table)), barred)


def test_errors_are_those_of_a_selection():
    P = pool(5, "independent")
    with pytest.raises(InputError, match="not even the best row"):
        select_table(rule_of("mean", Budget(tokens=4)), ArrayTable(P))
    with pytest.raises(InputError, match="no candidate has a score"):
        select_table(rule_of("mean", Budget(rows=4)), ArrayTable(np.full_like(P, np.nan)))
    infinite = replace(rule_of("mean", Budget(rows=4)))
    P[7] = np.inf
    with pytest.raises(InputError, match="infinite"):
        select_table(infinite, ArrayTable(P))
