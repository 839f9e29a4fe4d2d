"""The rounds on pools drawn from the model: what they end with, and what they never exceed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from influence.budget import Budget
from influence.certified import Certified, Settings, audit_rows, initial_landmarks
from influence.certified_result import (
    audit_bounds,
    certified_scores,
    recall_certificate,
    reliability_bins,
)
from influence.features import make_features
from influence.posterior import believe
from influence.quotas import Quota
from influence.score_table import ArrayTable, rows_of
from influence.selection import Rule

N, K = 600, 30


@dataclass
class Pool:
    X: np.ndarray
    Y: np.ndarray


def _pool(seed: int, width: int = 4) -> Pool:
    draw = np.random.default_rng(seed)
    X = draw.normal(size=(N, width))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    features = make_features(X, kernel="laplace")
    field = features(X) @ draw.normal(size=(features.size, 2))
    return Pool(X, field + 0.1 * draw.normal(size=field.shape))


def _begin(combine: str = "round_robin", **changes) -> Certified:
    values = {"recall": 0.9, "count": N, "audit": 40, "kernel": "laplace", "damping": 0.01}
    keys = np.random.default_rng(9).integers(0, 2**63, N).astype(np.uint64)
    rule = Rule(np.array([0, 1]), np.arange(N), Budget(rows=K), combine)
    return Certified(rule, np.eye(2), keys, Settings(**{**values, "seed": 0, **changes}))


def _run(certified: Certified, pool: Pool, *, shards: int = 7, broken=frozenset()) -> list[str]:
    """Play the job's part: hand in scores and embeddings; returns the kinds of the steps."""
    scorable = np.ones(N, dtype=bool)
    rows = np.sort(np.random.default_rng(5).choice(N, 80, replace=False))
    kinds = []
    while True:
        usable = np.array([row for row in rows if row not in broken], dtype=np.int64)
        scorable[[row for row in rows if row in broken]] = False
        certified.add(usable, pool.X[usable], pool.Y[usable], None)
        posterior = certified.fit()
        P, variance = np.empty((N, 2)), np.empty(N)
        for where in np.array_split(np.arange(N), shards):
            P[where], variance[where] = believe(posterior, pool.X[where].astype(np.float32))
        table = ArrayTable(P, variance, step=-(-N // shards))
        step = certified.next_step(table, np.flatnonzero(~scorable))
        kinds.append(step.kind)
        if step.kind == "done":
            return kinds
        assert len(np.unique(step.rows)) == len(step.rows)
        assert not certified.exact[step.rows].any(), "a row was asked for twice"
        rows = step.rows


@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
def test_what_is_handed_out_is_exact_and_nearly_all_of_the_truth(combine: str):
    recalls, bounds = [], []
    for seed in range(6):
        pool, certified = _pool(seed), _begin(combine)
        kinds = _run(certified, pool)
        assert kinds.count("audit") == 1
        selected = certified.selected.selection
        assert certified.exact[selected.order].all(), "an estimate was handed out"
        scores = rows_of(certified.table, np.flatnonzero(certified.exact)).P
        np.testing.assert_array_equal(scores, pool.Y[certified.exact])
        truth = certified.rule(pool.Y)
        recalls.append(len(np.intersect1d(truth.order, selected.order)) / K)
        certificate = recall_certificate(certified)
        found = certificate.selection
        assert found.low is not None
        assert found.low >= 0.9
        assert found.exact_gradients == certified.exact.sum() < N
        assert found.audit_low is not None
        bounds.append(found.audit_low <= recalls[-1])
        assert [r.exact for r in certificate.rounds] == sorted(r.exact for r in certificate.rounds)
    assert np.mean(recalls) >= 0.9
    assert sum(bounds) >= 5, "the audit claimed more than the truth"


def test_thresholds_are_exact_so_that_weights_are():
    pool, certified = _pool(1), _begin()
    _run(certified, pool)
    selected = certified.selected.selection
    known = np.where(certified.exact[:, None], pool.Y, np.nan)
    np.testing.assert_allclose(certified.rule(known).tau, selected.tau, rtol=1e-12)


def test_shards_and_their_sizes_change_nothing():
    pool = _pool(2)
    one, other = _begin(), _begin()
    assert _run(one, pool, shards=1) == _run(other, pool, shards=90)
    np.testing.assert_array_equal(one.known.positions, other.known.positions)
    found, expected = recall_certificate(one), recall_certificate(other)
    assert found.selection == expected.selection
    assert found.named == expected.named


@pytest.mark.parametrize("count", [90, 110, 200])
def test_the_count_is_never_exceeded(count: int):
    pool, certified = _pool(3), _begin(count=count, recall=1.0)
    kinds = _run(certified, pool)
    assert certified.exact.sum() <= count
    certificate = recall_certificate(certified)
    estimated = (~certified.exact[certified.selected.selection.order]).sum()
    if estimated:
        assert certificate.selection.audit_low is None, "a bound of what was not audited"
    if count == 200:
        assert kinds.count("recall") >= 2, "the audit's reserve left the rounds nothing"
    assert certificate.selection.exact_gradients == certified.exact.sum()


def test_rows_that_turn_out_to_have_no_gradient_are_passed_over():
    pool, certified = _pool(4), _begin()
    truth = certified.rule(pool.Y).order
    broken = frozenset(truth[::3].tolist())
    _run(certified, pool, broken=broken)
    selected = certified.selected.selection.order
    assert not broken & set(selected.tolist())
    assert certified.exact[selected].all()


def test_a_pool_that_is_exact_from_the_start_needs_no_rounds():
    pool, certified = _pool(5), _begin()
    certified.add(np.arange(N), pool.X, pool.Y, None)
    certified.fit()
    step = certified.next_step(ArrayTable(np.zeros((N, 2))), np.empty(0, dtype=np.int64))
    assert step.kind == "done"
    assert recall_certificate(certified).selection.low == 1.0


def test_leave_one_out_scores_come_in_the_order_of_the_pool():
    pool, certified = _pool(6), _begin()
    _run(certified, pool)
    scores = certified_scores(certified)
    assert (np.diff(scores.exact_positions) > 0).all()
    np.testing.assert_array_equal(scores.exact_scores, pool.Y[scores.exact_positions])
    assert scores.calibration.sum() == 80
    assert scores.loo is not None
    gap = np.corrcoef(scores.loo[:, 0], scores.exact_scores[:, 0])[0, 1]
    assert gap > 0.5, "predictions and scores are of different rows"


def test_the_audit_bounds_every_name():
    pool, certified = _pool(7), _begin()
    _run(certified, pool)
    bounds = audit_bounds(certified)
    assert bounds is not None
    for j, low in enumerate(bounds.named):
        head = np.argsort(-pool.Y[:, j])[:K]
        assert low <= certified.exact[head].mean()


def test_reliability_is_counted_in_bins():
    bins = reliability_bins(
        np.array([0.01, 0.3, 0.4, 0.9]), np.array([False, True, False, True]), (0.2, 0.5)
    )
    assert [(b.rows, b.predicted, b.observed) for b in bins] == [
        (1, 0.01, 0.0),
        (2, pytest.approx(0.35), 0.5),
        (1, 0.9, 1.0),
    ]


def test_defaults_grow_slowly_with_the_pool():
    assert initial_landmarks(2000, 4096, None) == 157
    assert initial_landmarks(10_000_000, 100_000, None) == 11_068
    assert initial_landmarks(2000, 100, None) == 25
    assert initial_landmarks(2000, 4096, 300) == 300
    assert audit_rows(2000, None) == 256
    assert audit_rows(1_000_000, None) == 10_000
    assert audit_rows(2000, 64) == 64


def test_beyond_the_inducing_rows_the_rounds_go_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("influence.certified.MAX_INDUCING", 100)
    pool, certified = _pool(8), _begin()
    _run(certified, pool)
    assert certified.exact.sum() > 100
    features = certified.posterior.evidence.features
    assert len(features.inducing) == 100
    uniform = {row.tobytes() for row in certified.known.X[:80]}
    inside = sum(row.tobytes() in uniform for row in features.inducing)
    assert inside == 75, "rows that the rounds acquired have no part in the features"
    selected = certified.selected.selection
    truth = certified.rule(pool.Y)
    assert np.isin(truth.order, selected.order).mean() >= 0.85


def test_there_is_no_bound_where_displaced_rows_cannot_be_counted():
    """One long row may drop ten short ones; with quotas a round robin's chain breaks."""
    pool = _pool(9)
    for change in (
        {"budget": Budget(tokens=300), "n_tokens": np.full(N, 10)},
        {"sources": ["a", "b"] * (N // 2), "per_source": {"a": Quota(0.0, 0.5)}},
    ):
        certified = _begin()
        certified.rule = replace(certified.rule, **change)
        _run(certified, pool)
        bounds = audit_bounds(certified)
        assert bounds is not None
        assert bounds.selection is None
        assert all(0 <= low <= 1 for low in bounds.named)
