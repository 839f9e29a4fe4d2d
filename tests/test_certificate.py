"""The certificate of a run against the functions it is made of, and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from influence.budget import Budget
from influence.certificate import certificate_of, deciding_score, named_scores
from influence.fidelity import certify
from influence.score_table import ArrayTable
from influence.scores import Scores
from influence.selection import combined_score, select
from influence.target_columns import Column, TargetColumns

COLUMNS = TargetColumns(
    (
        Column("a", "a:r0", (0,)),
        Column("a", "a:r1", (1,)),
        Column("b", "b/x", (0, 2)),
        Column("b", "b/y", (1,)),
    ),
    ("a", "b", "b/x", "b/y"),
)
N, L = 60, 25


def _scores(seed: int = 0, *, halves: bool = False, predicted: bool = True) -> Scores:
    """60 rows, 25 of them exact, predictions with noise; three rows have no score."""
    rng = np.random.default_rng(seed)
    P = rng.normal(size=(N, 4))
    positions = np.sort(rng.choice(np.arange(3, N), L, replace=False))
    P[:3] = np.nan
    exact = np.zeros(N, dtype=bool)
    exact[positions] = True
    Y = P[positions]
    noise = rng.normal(scale=0.1, size=Y.shape)
    loo = Y + rng.normal(scale=0.7, size=Y.shape) if predicted else None
    if not halves:
        return Scores(ArrayTable(P), exact, positions, Y, loo, None)
    both = np.stack([Y + noise, Y - noise])
    loo_halves = None
    if loo is not None:
        apart = rng.normal(scale=0.2, size=Y.shape)
        loo_halves = np.stack([loo + apart, loo - apart])
    return Scores(ArrayTable(P), exact, positions, Y, loo, both, loo_halves)


def _select(scores: Scores, combine: str, k: int = 12):
    ids = [f"{i:03d}" for i in range(N)]
    target_of = COLUMNS.target_of
    return select(
        scores.table.P, column_target=target_of, ids=ids, budget=Budget(rows=k), combine=combine
    )


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
def test_every_name_has_the_certificate_of_its_mean_scores(halves: bool, combine: str):
    scores = _scores(halves=halves)
    selection = _select(scores, combine)
    found = certificate_of(
        scores, selection, COLUMNS, method="influence_distillation", combine=combine, seed=5
    )
    # Means over a name's columns, by hand.
    members = {"a": [0, 1], "b": [2, 3], "b/x": [2], "b/y": [3]}
    assert scores.loo is not None
    for name, columns in members.items():
        expected = certify(
            scores.exact_scores[:, columns].mean(axis=1, keepdims=True),
            scores.loo[:, columns].mean(axis=1, keepdims=True),
            n=N - 3,
            share=12 / (N - 3),
            halves=None
            if scores.halves is None
            else scores.halves[:, :, columns].mean(axis=2, keepdims=True),
            loo_halves=None
            if scores.loo_halves is None
            else scores.loo_halves[:, :, columns].mean(axis=2, keepdims=True),
            seed=5,
        )[0]
        target = found.targets[name]
        pairs = [
            (target.spearman.value, expected.spearman.value),
            (target.spearman.low, expected.spearman.low),
            (target.spearman.high, expected.spearman.high),
            (target.recall.expected, expected.recall.expected),
            (target.recall.low, expected.recall.low),
            (target.recall.high, expected.recall.high),
            (target.r2, expected.r2),
            (target.score_halfwidth, expected.score_halfwidth),
            (target.landmark_halfwidth, expected.landmark_halfwidth),
            (target.sketch_sd, expected.sketch_sd),
            (target.reliability, expected.reliability),
        ]
        for value, wanted in pairs:
            same = wanted if wanted is None else pytest.approx(wanted, rel=1e-9, abs=1e-12)
            assert value == same, f"{name}: certificates are mixed up"
        assert target.recall.exact_gradients == L
    assert list(found.targets) == list(COLUMNS.names)
    assert (found.exact, found.landmarks) == (False, L)


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_the_whole_is_certified_by_the_combined_score(combine: str):
    scores = _scores()
    assert scores.loo is not None
    found = certificate_of(
        scores, _select(scores, combine), COLUMNS, method="m", combine=combine, seed=5
    )

    def combined(P: np.ndarray) -> np.ndarray:
        if combine == "max":
            return np.array([[max(row)] for row in P])
        return np.array([[(row[0] + row[1]) / 4 + (row[2] + row[3]) / 4] for row in P])

    expected = certify(
        combined(scores.exact_scores), combined(scores.loo), n=N - 3, share=12 / (N - 3), seed=5
    )[0]
    assert found.recall.expected == pytest.approx(expected.recall.expected, rel=1e-9)
    assert found.recall.low == pytest.approx(expected.recall.low, rel=1e-9)
    assert found.recall.high == pytest.approx(expected.recall.high, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 7, 30, N - 4])
def test_the_deciding_score_is_positive_exactly_for_what_round_robin_takes(seed: int, k: int):
    scores = _scores(seed)
    selection = _select(scores, "round_robin", k)
    margin = deciding_score(selection, COLUMNS, "round_robin")(scores.table.P)
    # Turns by brute force: target j mod 2, its column (j div 2) mod 2, the best row still free.
    taken: list[int] = []
    for turn in range(k):
        column = 2 * (turn % 2) + (turn // 2) % 2
        free = [i for i in range(3, N) if i not in taken]
        taken.append(max(free, key=lambda i: scores.table.P[i, column]))
    assert set(np.flatnonzero(margin > 0)) == set(taken), "the threshold is not round robin's"
    rest = [i for i in range(3, N) if i not in taken]
    assert margin[rest].max() == pytest.approx(0, abs=1e-12), "the best row left is the threshold"


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_the_deciding_score_ranks_as_the_selection_does(combine: str):
    scores = _scores()
    selection = _select(scores, combine)
    decides = deciding_score(selection, COLUMNS, combine)(scores.table.P)
    expected = combined_score(scores.table.P, COLUMNS.target_of, combine)[0]
    np.testing.assert_array_equal(decides, expected)
    ranked = np.argsort(np.where(np.isnan(decides), np.inf, -decides))[:12]
    assert ranked.tolist() == selection.order.tolist()


def test_exact_scores_are_certified_by_their_sketch_noise_alone():
    scores = _scores(predicted=False)
    selection = _select(scores, "mean")
    found = certificate_of(scores, selection, COLUMNS, method="exact", combine="mean", seed=0)
    assert found.exact
    for target in found.targets.values():
        assert target.spearman.value is None
        assert target.sketch_sd is None
        assert target.landmark_halfwidth == 0, "unprojected scores have no noise"
    noisy = _scores(predicted=False, halves=True)
    found = certificate_of(noisy, selection, COLUMNS, method="exact", combine="mean", seed=0)
    assert noisy.halves is not None
    half = noisy.halves[:, :, :2].mean(axis=2)
    sd = np.sqrt(np.mean((half[0] - half[1]) ** 2)) / 2
    assert found.targets["a"].sketch_sd == pytest.approx(sd, rel=1e-12)
    assert found.targets["a"].landmark_halfwidth == pytest.approx(norm.ppf(0.95) * sd, rel=1e-12)


def test_leave_one_out_scores_are_needed():
    with pytest.raises(ValueError, match="nothing was predicted"):
        named_scores(_scores(predicted=False), COLUMNS)
