"""Selection against naive loops and brute force."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest

from influence.budget import Budget, parse_budget
from influence.errors import InputError
from influence.quotas import Quota, open_quotas
from influence.selection import Rule, combined_score, select
from influence.weights import id_ranks, round_robin_weights

ROWS = 24


def _problem(seed: int, columns: int = 5, ties: bool = True):
    """Scores (with ties and NaN rows), targets of the columns, ids in no order, sources."""
    rng = np.random.default_rng(seed)
    P = rng.integers(0, 6, (ROWS, columns)).astype(float) if ties else rng.random((ROWS, columns))
    P[rng.choice(ROWS, 3, replace=False)] = np.nan
    column_target = np.array([0, 1, 0, 2, 1, 0, 2])[:columns]
    ids = [f"id{v:03d}" for v in rng.permutation(1000)[:ROWS]]
    sources = rng.choice(["math/a", "math/b", "code", "chat"], ROWS).tolist()
    return P, column_target, ids, sources


def _naive_round_robin(P, column_target, ids, k):
    targets = sorted(set(column_target.tolist()))
    order, picker = [], []
    for turn in range(k):
        target = targets[turn % len(targets)]
        columns = [c for c, t in enumerate(column_target) if t == target]
        column = columns[(turn // len(targets)) % len(columns)]
        free = [i for i in range(len(P)) if i not in order and not np.isnan(P[i, column])]
        best = min(free, key=lambda i: (-P[i, column], ids[i], i))
        order.append(best)
        picker.append(column)
    return order, picker


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("columns", [1, 2, 5, 7])
def test_round_robin_is_the_naive_loop(seed: int, columns: int):
    P, column_target, ids, _ = _problem(seed, columns)
    for k in (1, 6, 20, ROWS - 3):
        chosen = select(P, column_target=column_target, ids=ids, budget=Budget(rows=k))
        order, picker = _naive_round_robin(P, column_target, ids, k)
        assert chosen.order.tolist() == order, "turn order, or a tie not broken by id"
        assert chosen.column.tolist() == picker, "the wrong column is credited with a pick"
        assert (chosen.weights > 0).all(), "a selected row has no weight"
        assert chosen.weights.sum() == pytest.approx(ROWS - 3, rel=1e-12), "n counts scored rows"
        np.testing.assert_array_equal(chosen.score, P[order, picker])


def test_round_robin_weights_hold_each_pick_against_its_column():
    P, column_target, ids, _ = _problem(1, 3, ties=False)
    chosen = select(P, column_target=column_target, ids=ids, budget=Budget(rows=7))
    left = np.setdiff1d(np.flatnonzero(~np.isnan(P[:, 0])), chosen.order)
    np.testing.assert_allclose(chosen.tau, [P[left, c].max() for c in range(3)], rtol=0)
    raw = np.array(
        [P[i, c] - P[left, c].max() for i, c in zip(chosen.order, chosen.column, strict=True)]
    )
    np.testing.assert_allclose(chosen.weights, raw * 21 / raw.sum(), rtol=1e-10)


@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("seed", range(4))
def test_mean_and_max_take_the_best_combined_scores(combine: str, seed: int):
    P, column_target, ids, _ = _problem(seed, 7)
    slow = []
    for row in P:
        by_target = [
            np.mean([v for v, t in zip(row, column_target, strict=True) if t == target])
            for target in (0, 1, 2)
        ]
        slow.append(np.mean(by_target) if combine == "mean" else max(row))
    score, best = combined_score(P, column_target, combine)
    np.testing.assert_allclose(score, slow, rtol=1e-12, err_msg="mean is over targets' means")
    chosen = select(P, column_target=column_target, ids=ids, budget=Budget(rows=6), combine=combine)
    scored = [i for i in range(ROWS) if not np.isnan(score[i])]
    expected = sorted(scored, key=lambda i: (-score[i], ids[i]))[:6]
    assert chosen.order.tolist() == expected
    weights, tau = round_robin_weights(score[:, None], [np.array(expected)])
    np.testing.assert_allclose(chosen.weights, weights[chosen.order], rtol=1e-12)
    np.testing.assert_allclose(chosen.tau, tau, rtol=0)
    np.testing.assert_array_equal(chosen.column, best[expected])


def test_combined_score_names_the_best_column():
    P = np.array([[5.0, 0.0, 3.0], [1.0, 2.0, 1.0], [np.nan] * 3])
    column_target = np.array([0, 0, 1])
    score, best = combined_score(P, column_target, "mean")
    # target means of row 0: 2.5 and 3; of row 1: 1.5 and 1
    np.testing.assert_allclose(score, [2.75, 1.25, np.nan], rtol=1e-12)
    assert best.tolist() == [2, 1, -1], "the best column of the target with the best mean"
    score, best = combined_score(P, column_target, "round_robin")
    np.testing.assert_allclose(score, [5.0, 2.0, np.nan], rtol=0)
    assert best.tolist() == [0, 1, -1]


@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
@pytest.mark.parametrize("quota", [False, True])
def test_selection_does_not_depend_on_the_order_of_rows(combine: str, quota: bool):
    for seed in range(6):
        P, column_target, ids, sources = _problem(seed)
        per_source = {"math/*": Quota(0.25, 0.5)} if quota else None
        shuffle = np.random.default_rng(seed).permutation(ROWS)
        results = []
        for rows in (np.arange(ROWS), shuffle):
            chosen = select(
                P[rows],
                column_target=column_target,
                ids=[ids[i] for i in rows],
                sources=[sources[i] for i in rows],
                budget=Budget(rows=8),
                combine=combine,
                per_source=per_source,
            )
            results.append(([ids[rows[i]] for i in chosen.order], chosen.weights))
        assert results[0][0] == results[1][0], "the selection depends on the order of the pool"
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-10)


@pytest.mark.parametrize("seed", range(12))
def test_quotas_are_the_best_feasible_set(seed: int):
    rng = np.random.default_rng(seed)
    P = rng.random((11, 1))
    P[rng.integers(11)] = np.nan
    sources = ["a", "a", "b", "b", "b", "c", "c", "c", "c", "a", "b"]
    per_source = {
        "a": Quota(max=float(rng.choice([0.2, 0.4, 1.0]))),
        "b": Quota(min=float(rng.choice([0.0, 0.2, 0.4]))),
        "c": Quota(min=0.2, max=0.6),
    }
    k = 5
    chosen = select(
        P,
        column_target=np.array([0]),
        ids=[f"{i:02d}" for i in range(11)],
        sources=sources,
        budget=Budget(rows=k),
        per_source=per_source,
        combine="max",
    )

    def feasible(rows):
        for name, quota in per_source.items():
            taken = sum(sources[i] == name for i in rows)
            if not quota.min * k - 1e-9 <= taken <= quota.max * k + 1e-9:
                return False
        return not np.isnan(P[list(rows), 0]).any()

    sets = [rows for rows in combinations(range(11), k) if feasible(rows)]
    best = max(sets, key=lambda rows: P[list(rows), 0].sum())
    assert sorted(chosen.order.tolist()) == sorted(best), "quotas are broken or not optimal"
    assert (chosen.weights > 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_round_robin_with_quotas_is_the_naive_greedy(seed: int):
    P, column_target, ids, sources = _problem(seed, 4)
    k, least, most = 10, {"code": 3}, {"code": 10, "math": 4, "": 10}
    groups = ["math" if s.startswith("math") else "code" if s == "code" else "" for s in sources]
    scored = [i for i in range(ROWS) if not np.isnan(P[i, 0])]
    if sum(groups[i] == "code" for i in scored) < 3:
        pytest.fail("the seed gives no feasible problem; take another")
    taken, targets = [], sorted(set(column_target.tolist()))
    for turn in range(k):
        columns = np.flatnonzero(column_target == targets[turn % len(targets)])
        column = columns[(turn // len(targets)) % len(columns)]

        def allowed(i, taken=taken):
            after = [*taken, i]
            count = {g: sum(groups[j] == g for j in after) for g in most}
            owed = sum(max(0, need - count[g]) for g, need in least.items())
            return i not in taken and count[groups[i]] <= most[groups[i]] and owed <= k - len(after)

        taken.append(min(filter(allowed, scored), key=lambda i: (-P[i, column], ids[i])))
    chosen = select(
        P,
        column_target=column_target,
        ids=ids,
        sources=sources,
        budget=Budget(rows=k),
        per_source={"math/*": Quota(max=0.4), "code": Quota(min=0.3)},
    )
    assert chosen.order.tolist() == taken, "a minimum is not reserved or a maximum not enforced"
    assert chosen.groups == ("math/*", "code", "")
    assert chosen.tau.shape == (4, 3)


@pytest.mark.parametrize(
    ("per_source", "message"),
    [
        ({"math/*": Quota(min=0.7), "code": Quota(min=0.4)}, r"minima of math/\*, code sum to 1.1"),
        ({"code": Quota(min=0.5, max=0.2)}, r"per_source\.code: min 0.5 is above max 0.2"),
        ({"code": Quota(max=5.0)}, r"per_source\.code\.max: 5.0"),
        ({"books": Quota(max=0.5)}, r"per_source\.books: matches no source"),
        ({"code": Quota(min=1.0)}, r"per_source\.code\.min"),
        ({"*": Quota(max=0.3)}, r"leave room for 6 of the 20 rows"),
    ],
)
def test_infeasible_quotas_name_their_key(per_source: dict[str, Quota], message: str):
    P, column_target, ids, sources = _problem(0)
    with pytest.raises(InputError, match=message):
        select(
            P,
            column_target=column_target,
            ids=ids,
            sources=sources,
            budget=Budget(rows=20),
            per_source=per_source,
        )


def test_token_budget_ends_before_the_row_that_exceeds_it():
    P = np.array([[4.0], [3.0], [2.0], [1.0]])
    tokens = np.array([50, 40, 100, 1])
    problem = {"column_target": np.array([0]), "ids": list("abcd"), "n_tokens": tokens}
    chosen = select(P, budget=Budget(tokens=100), **problem)
    assert chosen.order.tolist() == [0, 1], "row 2 does not fit, and row 3 must not overtake it"
    assert select(P, budget=Budget(tokens=190), **problem).order.tolist() == [0, 1, 2]
    everything = select(P, budget=Budget(tokens=1000), **problem)
    assert everything.order.tolist() == [0, 1, 2, 3]
    assert everything.budget_exceeds_pool
    with pytest.raises(InputError, match="hold not even the best row"):
        select(P, budget=Budget(tokens=49), **problem)
    with pytest.raises(InputError, match=r"selection\.per_source: quotas are shares of rows"):
        select(
            P, budget=Budget(tokens=100), sources=list("xxyy"), per_source={"x": Quota()}, **problem
        )


def test_a_budget_larger_than_the_pool_takes_every_scored_row():
    P, column_target, ids, _ = _problem(2)
    chosen = select(P, column_target=column_target, ids=ids, budget=Budget(rows=1000))
    assert sorted(chosen.order.tolist()) == np.flatnonzero(~np.isnan(P[:, 0])).tolist()
    assert chosen.budget_exceeds_pool
    np.testing.assert_allclose(chosen.weights, 1.0, rtol=1e-12, err_msg="all rows: equal weights")
    tenth = select(P, column_target=column_target, ids=ids, budget=Budget(share=0.1))
    assert len(tenth.order) == 2, "10 % of 21 scored rows"
    assert not tenth.budget_exceeds_pool


def test_scores_in_some_columns_only_and_no_scores_are_refused():
    P = np.array([[1.0, 2.0], [np.nan, 1.0]])
    problem = {"column_target": np.array([0, 1]), "ids": ["a", "b"], "budget": Budget(rows=1)}
    with pytest.raises(InputError, match="row 1 has no score in column 0"):
        select(P, **problem)
    with pytest.raises(InputError, match="no candidate has a score"):
        select(P * np.nan, **problem)
    with pytest.raises(InputError, match=r"selection\.combine: 'sum'"):
        select(P, combine="sum", **problem)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (5000, Budget(rows=5000)),
        ("5000", Budget(rows=5000)),
        (5000.0, Budget(rows=5000)),
        ("10k", Budget(rows=10_000)),
        ("5_000 rows", Budget(rows=5000)),
        ("5%", Budget(share=0.05)),
        (" 0.5 % ", Budget(share=0.005)),
        ("100%", Budget(share=1.0)),
        ("2M tokens", Budget(tokens=2_000_000)),
        ("500k tokens", Budget(tokens=500_000)),
        ("1.5m tokens", Budget(tokens=1_500_000)),
        ("1B tokens", Budget(tokens=10**9)),
        ("50% of proponents", Budget(proponents=0.5)),
        (" 12.5 %  of the proponents", Budget(proponents=0.125)),
    ],
)
def test_budgets(text: str | int | float, budget: Budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        *(0, -3, 2.5, True, "", "0%", "101%", "5M%", "five", "-5%", "1.5", "0.1k tokens x", "nan"),
        *("0% of proponents", "101% of proponents", "5 of proponents", "50% of rows"),
    ],
)
def test_bad_budgets_name_the_key(text: str | int | float):
    with pytest.raises(InputError, match=r"selection\.budget"):
        parse_budget(text)


def _naive_floor(P, column_target, ids, k):
    """As `_naive_round_robin`, where a column whose best free row has no score above 0 passes."""
    targets = sorted(set(column_target.tolist()))
    order, picker, turn = [], [], 0
    for turn in range(10_000):
        if len(order) == k:
            break
        target = targets[turn % len(targets)]
        columns = [c for c, t in enumerate(column_target) if t == target]
        column = columns[(turn // len(targets)) % len(columns)]
        free = [i for i in range(len(P)) if i not in order and P[i, column] > 0]
        if free:
            order.append(min(free, key=lambda i: (-P[i, column], ids[i], i)))
            picker.append(column)
    return order, picker


def _proponent_rule(problem, budget: Budget, combine: str = "round_robin", **options) -> Rule:
    _, column_target, ids, _ = problem
    return Rule(column_target, id_ranks(ids), budget, combine, floor=0.0, **options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shift", [-1, -3, -4])
def test_only_proponents_are_taken_and_columns_without_any_pass(seed: int, shift: int):
    problem = P, column_target, ids, _ = _problem(seed, 5)
    P += shift
    helpful = int((P > 0).any(axis=1).sum())
    for k in (1, 5, 12, 1000):
        chosen = _proponent_rule(problem, Budget(rows=k))(P)
        order, picker = _naive_floor(P, column_target, ids, min(k, helpful))
        assert chosen.order.tolist() == order
        assert chosen.column.tolist() == picker, "credited to a column that the row does not help"
        assert chosen.proponents == helpful
        # Where every scored row helps, the budget is larger than the pool, and that is said.
        assert chosen.short_of_proponents == (helpful < min(k, ROWS - 3))
        assert len(order) == min(k, helpful), "a proponent is left although there was room"


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_a_share_of_the_proponents(combine: str):
    problem = P, column_target, _, _ = _problem(3, 5, ties=False)
    P -= 0.5
    score = combined_score(P, column_target, combine)[0]
    helpful = np.flatnonzero(score > 0)
    for share in (0.5, 1.0):
        chosen = _proponent_rule(problem, Budget(proponents=share), combine)(P)
        best = helpful[np.argsort(-score[helpful])][: round(share * len(helpful))]
        assert chosen.order.tolist() == best.tolist()
        assert not chosen.short_of_proponents
    n_scored = int((~np.isnan(score)).sum())
    of_the_pool = _proponent_rule(problem, Budget(share=0.2), combine)(P)
    assert len(of_the_pool.order) == round(0.2 * n_scored), "a percentage is of the scored rows"
    with pytest.raises(InputError, match="not one of the 21 scored candidates is a proponent"):
        _proponent_rule(problem, Budget(rows=3), combine)(P - 10)
    with pytest.raises(InputError, match="share of the proponents needs scores with a sign"):
        select(P, column_target=column_target, ids=problem[2], budget=Budget(proponents=0.5))


def test_tokens_and_quotas_among_proponents():
    P = np.array([[4.0], [3.0], [2.0], [-1.0], [1.0]])
    tokens = np.array([50, 40, 100, 1, 60])
    problem = (P, np.array([0]), list("abcde"), None)
    rule = _proponent_rule(problem, Budget(tokens=300), n_tokens=tokens)
    assert rule(P).order.tolist() == [0, 1, 2, 4], "a row that does harm filled the tokens up"
    assert rule(P).short_of_proponents
    rule = _proponent_rule(problem, Budget(tokens=190), n_tokens=tokens)
    assert rule(P).order.tolist() == [0, 1, 2]
    assert not rule(P).short_of_proponents
    quotas = {"x": Quota(min=0.5), "y": Quota(max=0.5)}
    rule = _proponent_rule(problem, Budget(rows=2), sources=list("yyyxx"), per_source=quotas)
    assert rule(P).order.tolist() == [0, 4], "a quota was filled with a row that does harm"
    quotas = {"x": Quota(min=1.0)}
    rule = _proponent_rule(problem, Budget(rows=2), sources=list("yyyxx"), per_source=quotas)
    with pytest.raises(InputError, match=r"per_source\.x\.min.*these sources have 1 rows"):
        rule(P)


@pytest.mark.parametrize("text", [0.05, "0.05"])
def test_a_fraction_is_refused_with_a_hint(text: str | float):
    with pytest.raises(InputError, match="write 5%"):
        parse_budget(text)


def test_one_long_source_does_not_cost_every_row_its_length():
    sources = ["x" * 100_000, *(f"s{i % 7}" for i in range(2_000))]
    tracemalloc.start()
    state = open_quotas({"s[0-2]": Quota(max=0.5), "x*": Quota()}, sources, np.full(2_001, True), 9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = [1] + [0 if i % 7 < 3 else 2 for i in range(2_000)]
    assert state.group.tolist() == expected
    assert peak < 2**20, f"{peak / 2**20:.0f} MB: every source has the room of the longest one"
