"""Stated probabilities and recalls against the truth, on pools drawn from the model itself."""

from __future__ import annotations

import numpy as np
import pytest

from influence.budget import Budget
from influence.features import make_features
from influence.membership import Membership, membership, on_threshold
from influence.posterior import (
    Calibration,
    believe,
    calibrate,
    leave_one_out,
    no_evidence,
    observe,
    posterior_of,
)
from influence.quotas import Quota
from influence.score_table import ArrayTable
from influence.selection import Rule, select
from influence.table_selection import select_table

N, RIDGE, K = 400, 0.05, 24


def _rule(combine: str, *, quotas: bool = False) -> Rule:
    return Rule(
        np.array([0, 0, 1]),
        np.arange(N),
        Budget(rows=K),
        combine,
        sources=[("a", "b")[i % 2] for i in range(N)],
        per_source={"a": Quota(0.0, 0.4)} if quotas else None,
    )


def believed(rule, P, variance, exact, calibration, *, step=N, seed=0, **options) -> Membership:
    """The membership of a table in blocks of `step` rows."""
    table = ArrayTable(P, variance, step)
    selected = select_table(rule, table)
    return membership(rule, table, exact, calibration, selected=selected, seed=seed, **options)


class Pool:
    """A pool whose scores are drawn from the model: of 80 rows they are known."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        X = draw.normal(size=(N, 5))
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        everything = make_features(X, kernel="laplace")
        between = np.linalg.cholesky(np.full((3, 3), 0.5) + 0.5 * np.eye(3)).T * [1.0, 2.0, 0.5]
        field = everything(X) @ draw.normal(size=(everything.size, 3))
        self.Y = (field + np.sqrt(RIDGE) * draw.normal(size=field.shape)) @ between
        known = np.sort(draw.choice(N, 80, replace=False))
        self.exact = np.isin(np.arange(N), known)
        features = make_features(X[known], kernel="laplace", bandwidth=everything.bandwidth)
        prior = no_evidence(features, ridge=RIDGE, mean=np.zeros(3))
        posterior = posterior_of(observe(prior, X[known], self.Y[known]))
        self.calibration = calibrate(leave_one_out(posterior, X[known], self.Y[known]))
        self.P, self.variance = believe(posterior, X)
        self.P[known], self.variance[known] = self.Y[known], 0.0

    def believed(self, rule: Rule, draws: int = 100) -> Membership:
        named = np.array([[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]])
        return believed(
            rule, self.P, self.variance, self.exact, self.calibration, named=named, draws=draws
        )


@pytest.mark.parametrize(
    ("combine", "quotas"), [("mean", False), ("max", False), ("round_robin", False), ("mean", True)]
)
def test_recall_and_probabilities_are_true_of_pools_drawn_from_the_model(
    combine: str, quotas: bool
):
    rule = _rule(combine, quotas=quotas)
    inside, gaps, predicted, observed = [], [], [], []
    pools = 200
    for seed in range(pools):
        pool = Pool(seed)
        found = pool.believed(rule, draws=60)
        member = np.zeros(N, dtype=bool)
        member[rule(pool.Y).order] = True
        true = pool.exact[member].mean()
        low, high = np.quantile(found.recall, [0.05, 0.95])
        inside.append(low <= true <= high)
        gaps.append(found.recall.mean() - true)
        predicted.append(found.probability[~pool.exact])
        observed.append(member[~pool.exact])
    # 3.3 standard deviations of a binomial below 0.9; discrete recalls only widen the interval.
    assert np.mean(inside) >= 0.9 - 3.3 * np.sqrt(0.09 / pools), f"covered {np.mean(inside):.2f}"
    error = np.std(gaps) / np.sqrt(pools)
    assert abs(np.mean(gaps)) < 3.5 * error + 0.01, (
        f"the stated recall is off by {np.mean(gaps):.3f} +- {error:.3f}: the draws' scale or the "
        "correlation between targets is wrong"
    )
    p, hit = np.concatenate(predicted), np.concatenate(observed)
    for low, high in ((0.01, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 0.95)):
        bin_ = (p >= low) & (p < high)
        spread = np.sqrt(p[bin_].mean() * (1 - p[bin_].mean()) / bin_.sum())
        assert hit[bin_].mean() == pytest.approx(p[bin_].mean(), abs=5 * spread + 0.03), (
            f"of rows with a stated probability of {low} to {high} another part were members"
        )
    assert p[hit].min() > 0, "a member had no probability at all"


def test_names_are_judged_by_their_own_best_rows():
    pool = Pool(1)
    found = pool.believed(_rule("mean"))
    alone = Rule(np.array([0]), np.arange(N), Budget(rows=K), "mean")
    column = pool.P[:, 2:]
    calibration = Calibration(pool.calibration.scale[2:], np.eye(1), pool.calibration.rows)
    other = believed(alone, column, pool.variance, pool.exact, calibration, named=np.eye(1), seed=3)
    assert found.named_recall[:, 1].mean() == pytest.approx(other.recall.mean(), abs=0.03)


@pytest.mark.parametrize("quotas", [False, True])
def test_blocks_change_nothing(quotas: bool):
    pool, rule = Pool(6), _rule("mean" if quotas else "round_robin", quotas=quotas)
    named = np.array([[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]])
    values = (rule, pool.P, pool.variance, pool.exact, pool.calibration)
    whole, other = (believed(*values, named=named, step=step) for step in (N, 7))
    np.testing.assert_array_equal(whole.probability, other.probability)
    np.testing.assert_array_equal(whole.recall, other.recall)
    np.testing.assert_array_equal(whole.named_recall, other.named_recall)


def test_with_every_score_known_nothing_is_missed():
    pool = Pool(2)
    found = believed(
        _rule("round_robin"),
        pool.Y,
        np.zeros(N),
        np.ones(N, dtype=bool),
        pool.calibration,
        named=np.eye(3),
    )
    assert found.recall.min() == found.named_recall.min() == 1.0
    assert found.probability.max() == 0.0


def test_rows_without_scores_are_never_members():
    pool = Pool(3)
    pool.P[~pool.exact] = np.nan
    found = pool.believed(_rule("mean"))
    assert found.recall.min() == 1.0
    assert found.probability.max() == 0.0


@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
def test_a_rule_selects_as_select_does_and_knows_who_holds_its_thresholds(combine: str):
    pool = Pool(4)
    rule = _rule(combine)
    ids = [f"{i:04d}" for i in range(N)]
    expected = select(
        pool.Y, column_target=rule.column_target, ids=ids, budget=rule.budget, combine=combine
    )
    found = rule(pool.Y)
    np.testing.assert_array_equal(found.order, expected.order)
    holders = on_threshold(rule, select_table(rule, ArrayTable(pool.Y, step=33)))
    assert 1 <= len(holders) <= 3
    for row in holders:
        without = pool.Y.copy()
        without[row] = np.nan
        assert not np.allclose(rule(without).tau, found.tau, rtol=1e-12)
