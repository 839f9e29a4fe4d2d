"""The robust objective's quadratic programme against an interior-point solver and all supports."""

from __future__ import annotations

import itertools

import clarabel
import numpy as np
import pytest
from scipy import sparse

from influence.robust_program import BudgetSolution, Solution, solve, solve_budget
from influence.weights import id_ranks, ranked, round_robin_weights


def _pool(n: int, rank: int, seed: int, *, shared: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Gains and a factor with B B' of the size of (1/n) A H A'; `shared` is a common direction."""
    draw = np.random.default_rng(seed)
    factor = (draw.standard_normal((n, rank)) + shared) / np.sqrt(n)
    return draw.standard_normal(n), factor


def _interior_point(
    c: np.ndarray, factor: np.ndarray, eta: float, lam: float, total: float
) -> np.ndarray:
    """The weights by clarabel, with z = B'w as variables beside them."""
    n, rank = factor.shape
    quadratic = sparse.block_diag([lam * sparse.identity(n), eta * sparse.identity(rank)])
    image = sparse.hstack([sparse.csc_matrix(factor.T), -sparse.identity(rank)])
    ones = sparse.hstack([np.ones((1, n)), sparse.csc_matrix((1, rank))])
    positive = sparse.hstack([-sparse.identity(n), sparse.csc_matrix((n, rank))])
    rows = sparse.vstack([image, ones, positive]).tocsc()
    right = np.concatenate([np.zeros(rank), [total], np.zeros(n)])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-13
    cones = [clarabel.ZeroConeT(rank + 1), clarabel.NonnegativeConeT(n)]
    linear = np.concatenate([-c, np.zeros(rank)])
    solver = clarabel.DefaultSolver(
        sparse.csc_matrix(quadratic), linear, rows, right, cones, settings
    )
    return np.array(solver.solve().x)[:n]


def _objective(w: np.ndarray, c: np.ndarray, factor: np.ndarray, eta: float, lam: float) -> float:
    image = factor.T @ w
    return float(-c @ w + eta / 2 * image @ image + lam / 2 * w @ w)


def _dense_residual(
    solution: Solution, c: np.ndarray, factor: np.ndarray, eta: float, total: float
) -> float:
    """`kkt_residual` row by row, with Q formed."""
    Q = factor.astype(np.float64) @ factor.astype(np.float64).T
    worst = 0.0
    for i, w in enumerate(solution.weights):
        if np.isinf(solution.lam):
            continue
        g = c[i] - eta * Q[i] @ solution.weights - solution.lam * w - solution.multiplier
        worst = max(worst, abs(g) if w > 0 else max(0.0, g))
    error = abs(sum(solution.weights) - total) / total
    return max(error, worst / np.abs(c).max())


def _by_all_supports(
    c: np.ndarray, factor: np.ndarray, eta: float, lam: float, total: float
) -> np.ndarray:
    """The best of the stationary points of all supports with positive weights."""
    n, best, least = len(c), np.zeros(len(c)), np.inf
    H = eta * factor @ factor.T + lam * np.eye(n)
    for size in range(1, n + 1):
        for support in map(list, itertools.combinations(range(n), size)):
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = H[np.ix_(support, support)], 0
            w = np.zeros(n)
            w[support] = np.linalg.solve(system, np.append(c[support], total))[:size]
            value = _objective(w, c, factor, eta, lam)
            if np.all(w >= 0) and value < least:
                best, least = w, value
    return best


def _equal_to_the_oracle(
    found: np.ndarray, expected: np.ndarray, total: float, *, atol: float
) -> None:
    mean = total / len(found)
    np.testing.assert_allclose(
        found / mean, expected / mean, rtol=0, atol=atol, err_msg="not the programme's optimum"
    )


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.3, 30.0])
@pytest.mark.parametrize("lam", [1e-3, 0.05, 2.0])
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_weights_agree_with_an_interior_point_solver(eta: float, lam: float, shared: float):
    c, factor = _pool(400, 12, 0, shared=shared)
    solution = solve(c, factor, eta=eta, lam=lam)
    expected = _interior_point(c, factor, eta, lam, 400)
    _equal_to_the_oracle(solution.weights, expected, 400, atol=1e-6)
    ours = _objective(solution.weights, c, factor, eta, lam)
    assert ours <= _objective(expected, c, factor, eta, lam) + 1e-6 * abs(ours), "not the optimum"
    assert solution.kkt < 1e-10, "Newton's method stopped early, or drifts"
    assert _dense_residual(solution, c, factor, eta, 400) < 1e-10, "kkt is not what it says it is"


def test_2000_variables_agree_with_an_interior_point_solver():
    c, factor = _pool(2000, 30, 1, shared=0.3)
    found = solve_budget(c, factor, np.arange(2000), eta=0.7, budget=100)
    assert (found.support, found.attainable) == (100, True)
    lam = found.solution.lam
    # The next row lies on the edge, where an interior point only reaches the root of its tolerance.
    gains = c - 0.7 * factor @ found.solution.image
    edge = np.argsort(-gains)[100]
    others = np.delete(np.arange(2000), edge)
    expected = np.zeros(2000)
    expected[others] = _interior_point(c[others], factor[others], 0.7, lam, 2000)
    _equal_to_the_oracle(found.solution.weights, expected, 2000, atol=1e-6)
    assert found.outside > 0, "nothing was screened: the proof was not put to the test"
    assert found.bound < 0, "a row outside the working set would enter"
    reduced = gains - found.solution.multiplier
    beyond = int(np.count_nonzero(reduced > found.bound + 1e-12))
    assert beyond <= 2000 - found.outside, "a row outside has a larger gain than the bound says"


@pytest.mark.parametrize("seed", range(12))
def test_small_programmes_agree_with_all_supports(seed: int):
    draw = np.random.default_rng(seed)
    n, rank = int(draw.integers(1, 8)), int(draw.integers(0, 4))
    c, factor = draw.standard_normal(n), draw.standard_normal((n, rank))
    for eta, lam in ((0.0, 0.3), (0.2, 0.01), (5.0, 0.4), (5.0, 1e-5)):
        expected = _by_all_supports(c, factor, eta, lam, 3.0)
        solution = solve(c, factor, eta=eta, lam=lam, total=3.0)
        _equal_to_the_oracle(solution.weights, expected, 3.0, atol=1e-7)
        assert np.array_equal(solution.weights > 0, expected > 1e-12), "zeros are not exact"
        np.testing.assert_allclose(solution.image, factor.T @ solution.weights, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 17, 39])
def test_without_curvature_it_is_the_closed_form(seed: int, k: int):
    c, factor = _pool(40, 3, seed)
    ids = [f"row-{i:04d}" for i in range(40)]
    ranks = id_ranks(ids)
    weights, tau = round_robin_weights(c[:, None], [ranked(c, ranks, k)[:k]])
    lam = float((np.sort(c)[::-1][:k] - tau[0]).sum() / 40)
    tiny = solve_budget(c, 1e-9 * factor, ranks, eta=1.0, budget=k)
    for found in (
        solve_budget(c, factor, ranks, eta=0.0, budget=k),
        solve_budget(c, factor[:, :0], ranks, eta=0.3, budget=k),
        solve_budget(c, 0 * factor, ranks, eta=0.3, budget=k),
        tiny,
    ):
        solution = found.solution
        np.testing.assert_allclose(
            solution.weights, weights, rtol=0, atol=1e-10, err_msg="not the closed form"
        )
        assert solution.multiplier == pytest.approx(tau[0], rel=1e-12, abs=1e-12)
        assert solution.lam == pytest.approx(lam, rel=1e-10)
        assert (found.support, found.attainable, found.left_out) == (k, True, 0)
        # The same from lambda, but for the row at the edge.
        again = solve(c, factor, eta=0.0, lam=lam)
        np.testing.assert_allclose(again.weights, weights, rtol=0, atol=1e-10)


def _checked(
    found: BudgetSolution, c: np.ndarray, factor: np.ndarray, eta: float
) -> BudgetSolution:
    """The same, once it is the optimum for its lambda and has the support that it says."""
    assert np.count_nonzero(found.solution.weights) == found.support, "support is miscounted"
    assert found.solution.kkt < 1e-9, "no optimum"
    if not found.left_out:
        assert _dense_residual(found.solution, c, factor, eta, len(c)) < 1e-9, "no optimum"
    return found


def _supports(c: np.ndarray, factor: np.ndarray, eta: float, grid: np.ndarray) -> list[int]:
    return [int(np.count_nonzero(solve(c, factor, eta=eta, lam=lam).weights)) for lam in grid]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eta", [1e-3, 1.0, 30.0, 1000.0])
def test_a_budget_is_met_or_said_to_be_out_of_reach(seed: int, eta: float):
    c, factor = _pool(60, 4, seed, shared=1.0 if seed % 2 else 0.0)
    supports = _supports(c, factor, eta, np.geomspace(1e-7, 1e3, 60))
    for budget in (1, 2, 5, 20, 59):
        found = _checked(
            solve_budget(c, factor, np.arange(60), eta=eta, budget=budget), c, factor, eta
        )
        assert found.attainable == (found.support == budget), "attainable contradicts the support"
        if budget >= min(supports):
            assert found.attainable, f"a lambda with a support of {min(supports)} or fewer exists"
        else:
            assert found.support <= min(supports), "a lambda with a smaller support exists"


def test_a_support_that_shrinks_as_lambda_grows_is_searched_too():
    seen = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        c, factor = draw.standard_normal(12) * 0.3, draw.standard_normal((12, 3))
        grid = np.geomspace(1e-5, 1e2, 50)
        supports = _supports(c, factor, 4.0, grid)
        if not np.any(np.diff(supports) < 0):
            continue
        seen += 1
        for budget in sorted(set(supports)):
            found = solve_budget(c, factor, np.arange(12), eta=4.0, budget=budget)
            _checked(found, c, factor, 4.0)
            assert found.support == budget, f"seed {seed}: lambda {grid[supports.index(budget)]}"
    assert seen >= 3, "the pools have monotone supports: the test shows nothing"
