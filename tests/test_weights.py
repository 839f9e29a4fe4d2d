"""Closed-form weights against a quadratic-programme solver, and their rules for ties."""

from __future__ import annotations

import tracemalloc

import clarabel
import numpy as np
import pytest
from scipy import sparse

from influence.errors import InputError
from influence.weights import id_ranks, ranked, round_robin_weights


def _solve_qp(p: np.ndarray, lam: float, total: float) -> np.ndarray:
    """minimise -p'w + lam/2 |w|^2 subject to w >= 0, sum(w) = total."""
    n = len(p)
    rows = sparse.vstack([np.ones((1, n)), -sparse.identity(n)]).tocsc()
    right = np.concatenate([[total], np.zeros(n)])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    quadratic = sparse.csc_matrix(lam * sparse.identity(n))
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(n)]
    return np.array(clarabel.DefaultSolver(quadratic, -p, rows, right, cones, settings).solve().x)


def _best(p: np.ndarray, k: int, ids: list[str]) -> tuple[np.ndarray, float]:
    """Weights and tau when one target takes its best k rows."""
    weights, tau = round_robin_weights(p[:, None], [ranked(p, id_ranks(ids), k)[:k]])
    return weights, float(tau[0])


def _ids(n: int) -> list[str]:
    return [f"row-{i:04d}" for i in range(n)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 3, 17])
def test_first_order_weights_solve_the_quadratic_programme(seed: int, k: int):
    p = np.random.default_rng(seed).standard_normal(40)
    weights, tau = _best(p, k, _ids(40))
    lam = float(np.maximum(0, p - np.sort(p)[::-1][k]).sum() / 40)
    # The (k+1)-th row lies on the edge (weight and multiplier both 0), where an interior-point
    # solver only reaches the root of its tolerance: solve without it, then compare objectives.
    others = np.delete(np.arange(40), np.argsort(-p)[k])
    expected = np.zeros(40)
    expected[others] = _solve_qp(p[others], lam, 40)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-6, err_msg="tau or lambda is off")

    def objective(w: np.ndarray) -> float:
        return float(-p @ w + lam / 2 * w @ w)

    assert objective(weights) <= objective(_solve_qp(p, lam, 40)) + 1e-8, "not the optimum"
    assert tau == np.sort(p)[::-1][k], "tau is the (k+1)-th largest score"
    assert np.count_nonzero(weights) == k
    np.testing.assert_allclose(weights, np.maximum(0, (p - tau) / lam), rtol=1e-12, atol=1e-12)


def test_rows_without_a_score_count_for_nothing():
    p = np.array([3.0, np.nan, 1.0, 2.0, 0.0])
    weights, tau = _best(p, 2, _ids(5))
    # n = 4, tau = 1, excess 2 and 1: lambda = 3/4, weights 8/3 and 4/3
    np.testing.assert_allclose(
        weights, [8 / 3, 0, 0, 4 / 3, 0], rtol=1e-12, atol=0, err_msg="NaN rows count in n"
    )
    assert tau == 1.0


def test_equal_weights_where_the_closed_form_leaves_a_pick_without_weight():
    p = np.array([2.0, 1.0, 1.0, 1.0, 0.0])
    weights, tau = _best(p, 2, ["e", "c", "d", "b", "a"])
    np.testing.assert_allclose(
        weights, [2.5, 0, 0, 2.5, 0], rtol=1e-12, err_msg="ties must go to the smallest id"
    )
    assert tau == 1.0
    for k in (5, 9):
        weights, tau = _best(p, k, _ids(5))
        np.testing.assert_allclose(weights, np.ones(5), rtol=1e-12, err_msg="k >= n: all rows, 1")
        assert tau == 0.0
    constant, _ = _best(np.full(6, 0.3), 2, _ids(6))
    np.testing.assert_allclose(constant, [3, 3, 0, 0, 0, 0], rtol=1e-12)


def test_head_of_the_ranking_keeps_ties_for_the_tie_breaker():
    rng = np.random.default_rng(0)
    for seed in range(50):
        p = np.random.default_rng(seed).integers(0, 4, 30).astype(float)
        p[rng.random(30) < 0.2] = np.nan
        ids = [f"{v}" for v in rng.integers(0, 15, 30)]
        slow = sorted(np.flatnonzero(~np.isnan(p)).tolist(), key=lambda i: (-p[i], ids[i], i))
        for limit in (1, 5, 30):
            fast = ranked(p, id_ranks(ids), limit)[:limit].tolist()
            assert fast == slow[:limit], "a tie at the cut is not broken by id, then position"


def _slow_round_robin(P, picks, groups):
    n = len(P)
    selected = {int(i) for rows in picks for i in rows}
    raw = dict.fromkeys(selected, 0.0)
    for column, rows in enumerate(picks):
        for i in rows:
            rivals = [j for j in range(n) if j not in selected and groups[j] == groups[i]]
            rivals = rivals or [j for j in range(n) if j not in selected]
            raw[int(i)] += P[i, column] - max(P[j, column] for j in rivals)
    total = sum(raw.values())
    return np.array([raw.get(i, 0.0) * n / total for i in range(n)])


@pytest.mark.parametrize("seed", range(5))
def test_round_robin_weights_by_the_definition(seed: int):
    rng = np.random.default_rng(seed)
    P = rng.standard_normal((30, 3))
    groups = rng.integers(0, 2, 30)
    for code in (np.zeros(30, dtype=int), groups):
        # every column's best two rows of each group: each pick beats what its group leaves
        picks = [
            np.concatenate(
                [
                    rows[np.argsort(-P[rows, c])[:2]]
                    for g in set(code.tolist())
                    for rows in [np.flatnonzero(code == g)]
                ]
            )
            for c in range(3)
        ]
        weights, tau = round_robin_weights(P, picks, code)
        np.testing.assert_allclose(
            weights,
            _slow_round_robin(P, picks, code),
            rtol=1e-10,
            atol=1e-12,
            err_msg="tau is not the best row left unselected in the pick's own group",
        )
        assert weights.sum() == pytest.approx(30, rel=1e-12)
        assert tau.shape == (3, code.max() + 1)


def test_a_pick_at_or_below_its_threshold_makes_all_weights_equal():
    P = np.array([[3.0, 0.0], [2.0, 2.0], [1.0, 2.0], [0.0, 1.0]])
    weights, tau = round_robin_weights(P, [np.array([0]), np.array([1])])
    np.testing.assert_allclose(weights, [2, 2, 0, 0], rtol=1e-12, err_msg="pick 1 ties with tau")
    np.testing.assert_allclose(tau, [1.0, 2.0], rtol=0)


def test_infinite_scores_and_empty_budgets_are_refused():
    with pytest.raises(InputError, match="row 1 has an infinite score"):
        _best(np.array([0.0, np.inf]), 1, _ids(2))
    with pytest.raises(InputError, match="no row with a score"):
        _best(np.array([np.nan]), 1, _ids(1))


def test_ranks_of_ids_are_those_of_a_stable_sort():
    draw = np.random.default_rng(0)
    for alphabet in ("ab", "aé\U0001f600z", "01:/"):
        ids = ["".join(draw.choice(list(alphabet), draw.integers(0, 4))) for _ in range(60)]
        expected = sorted(range(60), key=lambda i: (ids[i], i))
        assert np.argsort(id_ranks(ids)).tolist() == expected


def test_one_long_id_does_not_cost_every_row_its_length():
    ids = ["x" * 100_000, *(f"row {i}" for i in range(2_000))]
    tracemalloc.start()
    ranks = id_ranks(ids)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ranks[0] == len(ids) - 1
    assert peak < 2**20, f"{peak / 2**20:.0f} MB: every id has the room of the longest one"
