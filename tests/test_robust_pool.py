"""The robust objective's programme on large pools, with ties, on bad inputs and along lambda."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from influence.errors import InputError
from influence.lambda_path import lambda_path, weights_entropy
from influence.robust_program import kkt_residual, solve, solve_budget


def _pool(n: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gains and a factor whose columns fall in size, with a direction that all rows share."""
    draw = np.random.default_rng(seed)
    factor = draw.standard_normal((n, rank)) / np.sqrt(1 + np.arange(rank)) + 0.3
    return draw.standard_normal(n), factor / np.sqrt(n)


def _residual(solution, c: np.ndarray, factor: np.ndarray, eta: float, total: float) -> float:
    """The KKT residual from the weights and the duals alone, by the definition."""
    image = factor.astype(np.float64).T @ solution.weights
    g = c - eta * factor.astype(np.float64) @ image - solution.lam * solution.weights
    g -= solution.multiplier
    active = solution.weights > 0
    worst = max(np.abs(g[active]).max(), np.maximum(g[~active], 0).max(initial=0.0))
    return max(worst / np.abs(c).max(), abs(solution.weights.sum() - total) / total)


@pytest.mark.parametrize("share", [0.05, 0.001])
def test_a_million_rows_meet_the_budget_with_a_proof(share: float):
    n, budget = 1_000_000, int(1_000_000 * share)
    c, factor = _pool(n, 16, 0)
    factor = factor.astype(np.float32)
    found = solve_budget(c, factor, np.arange(n), eta=1.0, budget=budget)
    assert (found.support, found.attainable, found.left_out) == (budget, True, 0)
    assert found.solution.kkt < 1e-9, "no optimum"
    assert _residual(found.solution, c, factor, 1.0, n) < 1e-9, "kkt is not what it says it is"
    assert found.outside > n / 2, "the pool was not screened"
    assert found.bound < 0, "a row outside the working set would enter"
    again = solve(c, factor, eta=1.0, lam=found.solution.lam)
    np.testing.assert_allclose(again.weights, found.solution.weights, rtol=0, atol=1e-8)


def test_a_float32_factor_counts_as_the_numbers_it_holds():
    c, factor = _pool(3000, 8, 1)
    single = factor.astype(np.float32)
    for eta in (0.1, 10.0):
        found = solve_budget(c, single, np.arange(3000), eta=eta, budget=150)
        double = solve_budget(c, single.astype(np.float64), np.arange(3000), eta=eta, budget=150)
        np.testing.assert_array_equal(
            found.solution.weights, double.solution.weights, err_msg="float32 arithmetic"
        )


@pytest.mark.parametrize("n", [2000, 100_000])
def test_the_order_of_rows_and_a_second_run_change_nothing(n: int):
    c, factor = _pool(n, 8, 2)
    ranks = np.random.default_rng(3).permutation(n)
    found = solve_budget(c, factor, ranks, eta=3.0, budget=n // 50)
    second = solve_budget(c, factor, ranks, eta=3.0, budget=n // 50)
    np.testing.assert_array_equal(found.solution.weights, second.solution.weights)
    assert found.solution.lam == second.solution.lam, "the same inputs gave other bits"
    order = np.random.default_rng(4).permutation(n)
    moved = solve_budget(c[order], factor[order], ranks[order], eta=3.0, budget=n // 50)
    back = np.empty(n)
    back[order] = moved.solution.weights
    np.testing.assert_array_equal(
        back > 0, found.solution.weights > 0, err_msg="the selection depends on the order of rows"
    )
    np.testing.assert_allclose(back, found.solution.weights, rtol=0, atol=1e-9)


def test_rows_that_the_first_working_set_lacks_are_found(monkeypatch):
    # Gains alone point to the wrong rows: the best by c all share a costly direction.
    draw = np.random.default_rng(5)
    n = 3000
    c = draw.standard_normal(n)
    costly = c > np.sort(c)[-400]
    factor = draw.standard_normal((n, 3)) * 0.02
    factor[costly, 0] += 1.0
    whole = solve_budget(c, factor, np.arange(n), eta=1.0, budget=60)
    monkeypatch.setattr("influence.screening.MARGIN_ROWS", 0)
    found = solve_budget(c, factor, np.arange(n), eta=1.0, budget=60)
    assert np.count_nonzero(found.solution.weights[~costly]) > 30, "the test's pool is too easy"
    assert found.outside > whole.outside, "no working set was smaller"
    np.testing.assert_allclose(
        found.solution.weights,
        whole.solution.weights,
        rtol=0,
        atol=1e-8,
        err_msg="a row that would enter was screened out",
    )
    lam = whole.solution.lam
    again = solve(c, factor, eta=1.0, lam=lam)
    np.testing.assert_allclose(
        again.weights,
        whole.solution.weights,
        rtol=0,
        atol=1e-8,
        err_msg="for one lambda a row that would enter was screened out",
    )


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.5])
def test_ties_are_broken_by_rank_and_counted(eta: float):
    c, factor = _pool(20, 3, 6)
    c, factor = np.tile(c, 4), np.tile(factor, (4, 1))
    ranks = np.random.default_rng(7).permutation(80)
    for budget in (9, 10, 21, 33, 50):
        found = solve_budget(c, factor, ranks, eta=eta, budget=budget)
        assert (found.support, found.attainable) == (budget, True)
        chosen = found.solution.weights > 0
        cut = [g for g in range(20) if 0 < chosen[g::20].sum() < 4]
        assert found.left_out == sum(4 - int(chosen[g::20].sum()) for g in cut), "miscounted"
        for group in cut:
            members = np.arange(group, 80, 20)
            picked = ranks[members][chosen[members]]
            assert picked.max() < ranks[members][~chosen[members]].min(), "not the smallest ranks"
        if budget % 4:
            assert cut, "the budget cuts no group: the test shows nothing"
        # The rest is the optimum on the pool without the rows that were left out.
        stay = np.ones(80, dtype=bool)
        for group in cut:
            stay[group::20] = chosen[group::20]
        part = replace(found.solution, weights=found.solution.weights[stay])
        assert _residual(part, c[stay], factor[stay], eta, 80) < 1e-9, "no optimum on the others"


def test_twins_make_way_where_no_lambda_has_so_few_rows():
    c, factor = _pool(10, 3, 8)
    ranks = np.random.default_rng(9).permutation(30)
    alone = solve_budget(c, factor * 10, np.arange(10), eta=5.0, budget=1)
    thrice = solve_budget(
        np.tile(c, 3), np.tile(factor * 10, (3, 1)), ranks, eta=5.0, budget=1, total=10
    )
    assert not alone.attainable
    assert alone.support > 1, "the curvature is too weak for the test"
    assert (thrice.support, thrice.attainable) == (alone.support, False)
    assert thrice.left_out == 2 * alone.support, "equal rows stayed beside each other"
    chosen = np.flatnonzero(thrice.solution.weights)
    for row in chosen:
        assert ranks[row] == ranks[row % 10 :: 10].min(), "not the smallest rank of its equals"


def test_a_pool_without_any_preference():
    _, factor = _pool(30, 3, 10)
    ranks = np.random.default_rng(11).permutation(30)
    for rows in (factor[:, :0], 0 * factor, np.tile(factor[:1], (30, 1))):
        found = solve_budget(np.full(30, 0.3), rows, ranks, eta=0.5, budget=4)
        expected = np.where(ranks < 4, 7.5, 0.0)
        np.testing.assert_allclose(
            found.solution.weights, expected, rtol=1e-12, err_msg="ties are not broken by rank"
        )
        assert (found.support, found.attainable, found.left_out) == (4, True, 26)
    # Curvature alone: the rows that balance each other, whatever the constant.
    least = solve_budget(np.full(30, 0.3), factor, ranks, eta=0.5, budget=4)
    nothing = solve_budget(np.zeros(30), factor, ranks, eta=0.5, budget=4)
    assert least.solution.kkt < 1e-9
    assert least.support == nothing.support, "a constant added to the gains changes the selection"


def test_budgets_of_one_and_of_all():
    c, factor = _pool(50, 4, 12)
    one = solve_budget(c, factor, np.arange(50), eta=1e-4, budget=1)
    assert np.flatnonzero(one.solution.weights).tolist() == [int(np.argmax(c))]
    assert one.solution.weights.max() == pytest.approx(50, rel=1e-12)
    for budget in (50, 99):
        found = solve_budget(c, factor, np.arange(50), eta=1.0, budget=budget)
        np.testing.assert_allclose(found.solution.weights, 1.0, rtol=1e-12)
        assert (found.solution.lam, found.support, found.outside) == (np.inf, 50, 0)
        np.testing.assert_allclose(found.solution.image, factor.sum(axis=0), rtol=1e-10)
    single = solve(c[:1], factor[:1], eta=1.0, lam=0.5, total=3.0)
    assert single.weights.tolist() == [3.0]
    gain = c[0] - factor[0] @ factor[0] * 3.0
    assert single.multiplier == pytest.approx(gain - 0.5 * 3.0, rel=1e-12), "tau is off"


def test_scales_far_apart_leave_the_optimum_what_it_is():
    draw = np.random.default_rng(13)
    c, factor = _pool(200, 4, 14)
    wide = c * 10.0 ** draw.integers(-8, 9, 200)
    found = solve_budget(wide, factor, np.arange(200), eta=1e3, budget=5)
    assert _residual(found.solution, wide, factor, 1e3, 200) < 1e-9
    plain = solve_budget(c, factor, np.arange(200), eta=1.0, budget=20)
    for power in (-120, 120):
        scaled = solve_budget(
            c * 10.0**power, factor * 10.0 ** (power / 2), np.arange(200), eta=1.0, budget=20
        )
        np.testing.assert_allclose(
            scaled.solution.weights,
            plain.solution.weights,
            rtol=0,
            atol=1e-9,
            err_msg="the weights depend on the unit of the loss",
        )
        assert scaled.solution.lam == pytest.approx(plain.solution.lam * 10.0**power, rel=1e-9)
    for lam in (1e-300, 1e-14, 1e30):
        assert solve(c, factor, eta=1.0, lam=lam).kkt < 1e-10, f"lambda {lam}"


def test_the_residual_counts_every_way_to_be_wrong():
    c, factor = _pool(100, 4, 15)
    right = solve(c, factor, eta=1.0, lam=0.2)
    size = float(np.abs(c).max())

    def residual(weights: np.ndarray, tau: float) -> float:
        gains = c - factor @ (factor.T @ weights)
        return kkt_residual(gains, weights, tau=tau, lam=0.2, total=100, size=size)

    assert residual(right.weights, right.multiplier) < 1e-12
    assert residual(right.weights * 1.01, right.multiplier) > 1e-3, "the sum is not checked"
    assert residual(right.weights, right.multiplier - 0.1) > 1e-2, "tau is not checked"
    out = right.weights.copy()
    out[np.argmax(out)] = 0.0
    out *= 100 / out.sum()
    assert residual(out, right.multiplier) > 1e-2, "a row left out at weight 0 is not seen"


def test_a_start_changes_the_way_and_not_the_solution():
    c, factor = _pool(500, 6, 16)
    far = solve(c, factor, eta=2.0, lam=5.0)
    cold = solve(c, factor, eta=2.0, lam=0.01)
    warm = solve(c, factor, eta=2.0, lam=0.01, start=far)
    np.testing.assert_allclose(warm.weights, cold.weights, rtol=0, atol=1e-9)
    same = solve(c, factor, eta=2.0, lam=0.01, start=cold)
    assert same.iterations <= 1, "a start at the solution is not taken"


def test_the_path_says_what_lambda_does():
    c, factor = _pool(300, 5, 17)
    eta, lams = 0.8, [10.0, 1.0, 0.1, 0.01]
    for point, lam in zip(lambda_path(c, factor, eta=eta, lams=lams), lams, strict=True):
        w = solve(c, factor, eta=eta, lam=lam).weights
        shares = [x / 300 for x in w if x > 0]
        entropy = -sum(x * np.log(x) for x in shares)
        assert point.lam == lam
        assert point.support == len(shares)
        assert point.entropy == pytest.approx(entropy, rel=1e-9)
        assert point.effective_rows == pytest.approx(np.exp(entropy), rel=1e-9)
        Q = factor @ factor.T
        assert point.linear == pytest.approx(-eta / 300 * c @ w, rel=1e-9)
        assert point.quadratic == pytest.approx(eta**2 / 600 * w @ Q @ w, rel=1e-9)
        assert point.predicted_change == pytest.approx(point.linear + point.quadratic, rel=1e-12)
    predicted = [p.predicted_change for p in lambda_path(c, factor, eta=eta, lams=lams)]
    assert predicted == sorted(predicted, reverse=True), "a weaker penalty must predict more"
    budgets = [300, 100, 30, 10]
    along = lambda_path(c, factor, eta=eta, budgets=budgets)
    assert [p.support for p in along] == budgets
    for point, budget in zip(along, budgets, strict=True):
        found = solve_budget(c, factor, np.arange(300), eta=eta, budget=budget)
        assert point.lam == pytest.approx(found.solution.lam, rel=1e-9), "the start moved the end"
    assert weights_entropy(np.ones(8)) == pytest.approx(np.log(8), rel=1e-12)
    with pytest.raises(InputError, match="either lambdas or budgets"):
        lambda_path(c, factor, eta=eta)


def test_what_cannot_be_used_is_named():
    c, factor = _pool(40, 3, 18)
    ranks = np.arange(40)
    bad, worse = c.copy(), factor.copy()
    bad[7], worse[31, 2] = np.nan, np.inf
    with pytest.raises(InputError, match="gains: row 7 is not finite"):
        solve(bad, factor, eta=1.0, lam=1.0)
    with pytest.raises(InputError, match="curvature factor: row 31 is not finite"):
        solve_budget(c, worse, ranks, eta=1.0, budget=3)
    for eta in (-1.0, np.nan):
        with pytest.raises(InputError, match=r"weights\.eta"):
            solve(c, factor, eta=eta, lam=1.0)
    for lam in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(InputError, match="lambda: expected"):
            solve(c, factor, eta=1.0, lam=lam)
    with pytest.raises(InputError, match=r"selection\.budget: expected at least 1 row"):
        solve_budget(c, factor, ranks, eta=1.0, budget=0)
    with pytest.raises(InputError, match="one row for each"):
        solve(c[:-1], factor, eta=1.0, lam=1.0)
    with pytest.raises(InputError, match="ranks: expected one for each"):
        solve_budget(c, factor, ranks[:-1], eta=1.0, budget=3)
    with pytest.raises(InputError, match="expected float32 or float64"):
        solve(c, factor.astype(np.float16), eta=1.0, lam=1.0)
    with pytest.raises(InputError, match="no row with a score"):
        solve(c[:0], factor[:0], eta=1.0, lam=1.0)
    with pytest.raises(InputError, match="total: expected"):
        solve(c, factor, eta=1.0, lam=1.0, total=0.0)
