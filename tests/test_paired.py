"""Paired comparisons: the bootstrap against loops, seeds that are needed, the Pareto front."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from influence import paired


def test_bootstrap_has_the_distribution_of_all_resamples():
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(2, 3)), generator.normal(size=(2, 2))
    exact = []
    for s in product(range(2), repeat=2):
        for r in product(range(3), repeat=3):
            for q in product(range(2), repeat=2):
                cells = [first[i, j] for i in s for j in r]
                others = [second[i, j] for i in s for j in q]
                exact.append((np.mean(cells) + np.mean(others)) / 2)
    draws = paired.paired_bootstrap([first, second], draws=40_000, seed=0)
    levels = np.quantile(exact, np.linspace(0.05, 0.95, 10)) + 1e-9
    found = np.mean(draws[:, None] <= levels, axis=0)
    truth = np.mean(np.array(exact)[:, None] <= levels, axis=0)
    np.testing.assert_allclose(
        found, truth, rtol=0, atol=0.015, err_msg="are seeds resampled once for all test sets?"
    )


def test_difference_interval_covers_the_true_difference():
    inside, generator = 0, np.random.default_rng(0)
    for _ in range(200):
        seeds = generator.normal(0.0, 0.3, (12, 1))
        rows = generator.normal(0.0, 0.5, (1, 60))
        b = {"t": generator.normal(3.0, 1.0, (12, 60))}
        a = {"t": b["t"] - 0.2 + seeds + rows + generator.normal(0.0, 0.1, (12, 60))}
        found = paired.difference(a, b, draws=1000)
        inside += found.low <= -0.2 <= found.high
    assert inside >= 0.88 * 200, f"covers {inside / 200:.2f}: are both seeds and rows resampled?"


def test_difference_counts_the_seeds_that_are_needed():
    a = {"t": np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])}
    found = paired.difference(a, {"t": np.ones((3, 2))}, draws=10)
    assert found.value == pytest.approx(2.0)
    assert found.seed_sd == pytest.approx(1.0), "sd over seeds of the mean over rows"
    standard_error = found.seed_sd / found.seeds_until(2) ** 0.5
    assert found.value == pytest.approx(2 * standard_error), "two standard errors at that many"


def test_variance_ratio_recovers_the_variances():
    generator = np.random.default_rng(0)
    means = generator.normal(0, 2.0, (4000, 1)) + generator.normal(0, 3.0, (4000, 5))
    within, between = paired.variance_ratio(means)
    assert within == pytest.approx(9.0, rel=0.1)
    assert between == pytest.approx(4.0, rel=0.1), "seed noise left in the means' variance?"


def test_all_selections_are_resampled_alike():
    """A draw of two selections' means differs by the draw of their difference, pair for pair."""
    generator = np.random.default_rng(2)
    tests = [generator.normal(size=(3, 4, 7)), generator.normal(size=(3, 4, 5))]
    means = paired.resampled_means(tests, draws=50, seed=5)
    for a, b in ((0, 1), (2, 0)):
        own = paired.paired_bootstrap([each[a] - each[b] for each in tests], draws=50, seed=5)
        np.testing.assert_allclose(
            means[a] - means[b], own, atol=1e-12, err_msg="other resamples for each selection?"
        )


def test_the_bootstrap_is_that_of_loops_over_its_own_draws(monkeypatch: pytest.MonkeyPatch):
    """Every draw again by loops, with the same multinomial counts; blocks do not change them."""
    values = [np.random.default_rng(3).normal(size=(2, 3, 4))]
    counts = np.random.default_rng(9)
    seeds = counts.multinomial(3, np.full(3, 1 / 3), size=20)
    rows = counts.multinomial(4, np.full(4, 1 / 4), size=20)
    expected = np.zeros((2, 20))
    for k, draw in product(range(2), range(20)):
        cells = [
            values[0][k, s, r]
            for s in range(3)
            for r in range(4)
            for _ in range(seeds[draw, s] * rows[draw, r])
        ]
        assert len(cells) == 12
        expected[k, draw] = np.mean(cells)
    found = paired.resampled_means(values, draws=20, seed=9)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    monkeypatch.setattr(paired, "_BLOCK_ENTRIES", 16)  # four draws at once
    blocks = paired.resampled_means(values, draws=20_000, seed=9)
    monkeypatch.undo()
    once = paired.resampled_means(values, draws=20_000, seed=9)
    for moment in (np.mean, np.std):
        np.testing.assert_allclose(
            moment(blocks, axis=1),
            moment(once, axis=1),
            atol=0.02,
            err_msg="a block's draws have another distribution",
        )


def test_the_share_of_the_full_pools_gain():
    untrained, full = np.array([3.0, 3.0, 1.0]), np.array([1.0, 2.0, 2.0])
    found = paired.gain_share(untrained, np.array([2.0, 3.5, 0.5]), full)
    np.testing.assert_allclose(found, [0.5, -0.5, np.nan])


def test_the_pareto_front_by_its_definition():
    generator = np.random.default_rng(4)
    cost = generator.integers(0, 6, 40).astype(float)
    loss = generator.integers(0, 6, 40).astype(float)
    found = paired.pareto_front(cost, loss)
    for i in range(40):
        beaten = any(
            cost[j] <= cost[i] and loss[j] <= loss[i] and (cost[j] < cost[i] or loss[j] < loss[i])
            for j in range(40)
        )
        assert found[i] == (not beaten), f"point {i}: ties count as beaten?"
