"""Scores against loops over rows and targets."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from influence.schemas import VectorLayout
from influence.scoring import random_scores, sketched_halves, unit, usable_norm

RNG = np.random.default_rng(0)
V = RNG.normal(size=(5, 6)).astype(np.float32)
T = RNG.normal(size=(3, 6))
NORM = RNG.uniform(0.5, 3.0, 5)


@pytest.mark.parametrize("normalize", [True, False])
def test_rows_are_divided_by_the_norm_that_is_given(normalize: bool):
    rows = unit(V, NORM, normalize)
    assert rows.dtype == np.float64
    for i in range(5):
        for d in range(6):
            expected = float(V[i, d]) / NORM[i] if normalize else float(V[i, d])
            assert rows[i, d] == pytest.approx(expected, rel=1e-15), "not the exact norm"


@pytest.mark.parametrize("normalize", [True, False])
def test_halves_are_twice_the_products_of_the_two_halves(normalize: bool):
    halves = sketched_halves(V, NORM, T, normalize)
    for i in range(5):
        for m in range(3):
            scale = NORM[i] if normalize else 1.0
            parts = [float(V[i, d]) * T[m, d] / scale for d in range(6)]
            assert halves[0, i, m] == pytest.approx(2 * sum(parts[:3]), rel=1e-12)
            assert halves[1, i, m] == pytest.approx(2 * sum(parts[3:]), rel=1e-12)
            assert halves[:, i, m].mean() == pytest.approx(sum(parts), rel=1e-12), (
                "the mean of the halves is the product of the whole sketch"
            )


def test_halves_of_layers_that_are_projected_one_by_one():
    """A layer kept whole counts once in both halves, a projected one with either half twice."""
    blocks = [("whole", 0, 2), ("projected", 2, 4)]
    layout = VectorLayout(dtype="float32", dim=6, blocks=blocks, sizes=[2, 90])
    halves = sketched_halves(V, NORM, T, False, layout=layout)
    for i in range(5):
        for m in range(3):
            parts = [float(V[i, d]) * T[m, d] for d in range(6)]
            kept = parts[0] + parts[1]
            assert halves[0, i, m] == pytest.approx(kept + 2 * (parts[2] + parts[3]), rel=1e-9)
            assert halves[1, i, m] == pytest.approx(kept + 2 * (parts[4] + parts[5]), rel=1e-9)
    exact = VectorLayout(dtype="float32", dim=6, blocks=blocks, sizes=[2, 4])
    for one in sketched_halves(V, NORM, T, False, layout=exact):
        np.testing.assert_allclose(one, V.astype(np.float64) @ T.T, rtol=1e-12)


def test_a_norm_is_usable_if_it_is_finite_and_positive():
    norm = np.array([1.0, 0.0, np.nan, np.inf, -1.0, 1e-300])
    assert usable_norm(norm).tolist() == [True, False, False, False, False, True]


def test_random_scores_are_uniform_and_belong_to_the_row():
    digests = [hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in range(4000)]
    scores = random_scores(7, digests)
    assert scores.shape == (4000, 1)
    np.testing.assert_array_equal(random_scores(7, digests[::-1]), scores[::-1])
    assert ((scores >= 0) & (scores < 1)).all()
    deciles = np.histogram(scores, bins=10, range=(0, 1))[0]
    # 400 in each on average, standard deviation 19: five of them on either side.
    assert (np.abs(deciles - 400) < 95).all(), "not uniform"
    assert len(np.unique(scores)) == 4000
    other = random_scores(8, digests)
    assert abs(np.corrcoef(scores[:, 0], other[:, 0])[0, 1]) < 0.08, "seeds are not independent"
    assert len(random_scores(2**63 - 1, digests[:2])) == 2
