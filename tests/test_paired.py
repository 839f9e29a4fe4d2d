"""Paired comparisons: draws against loops and Student's t, seeds needed, the Pareto front."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import t as student

from influence import paired


def test_rows_have_the_distribution_of_all_resamples():
    """With one seed, whose weight is always 1, a draw resamples each test's rows on their own."""
    generator = np.random.default_rng(1)
    first, second = generator.normal(size=(1, 3)), generator.normal(size=(1, 2))
    exact = []
    for r in product(range(3), repeat=3):
        for q in product(range(2), repeat=2):
            cells, others = [first[0, j] for j in r], [second[0, j] for j in q]
            exact.append((np.mean(cells) + np.mean(others)) / 2)
    draws = paired.paired_bootstrap([first, second], draws=40_000, seed=0)
    levels = np.quantile(exact, np.linspace(0.05, 0.95, 10)) + 1e-9
    found = np.mean(draws[:, None] <= levels, axis=0)
    truth = np.mean(np.array(exact)[:, None] <= levels, axis=0)
    np.testing.assert_allclose(found, truth, rtol=0, atol=0.015)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_seeds_alone_have_students_interval(seeds: int):
    """Two tests whose rows are all alike: only the seeds' means vary, together."""
    means = np.random.default_rng(seeds).normal(size=(seeds, 2))
    draws = paired.paired_bootstrap(
        [np.repeat(means[:, [0]], 5, axis=1), np.repeat(means[:, [1]], 3, axis=1)],
        draws=200_000,
        seed=0,
    )
    of_seeds = means.mean(axis=1)
    error = of_seeds.std(ddof=1) / np.sqrt(seeds)
    for level in (0.5, 0.9, 0.95):
        exact = student.interval(level, seeds - 1, of_seeds.mean(), error)
        np.testing.assert_allclose(
            paired.interval(draws, level),
            exact,
            atol=0.03 * (exact[1] - exact[0]),
            err_msg="are seeds weighted once for all test sets, with seeds - 1 degrees of freedom?",
        )


@pytest.mark.parametrize("seeds", [2, 3, 12])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_difference_interval_covers_the_true_difference(seeds: int, noise: float):
    """Whether most of the noise is the rows' or the seeds', however few these are."""
    inside, generator, count = 0, np.random.default_rng(0), 300
    for _ in range(count):
        lucky = generator.normal(0.0, noise, (seeds, 1))
        rows = generator.normal(0.0, 0.5, (1, 60))
        b = {"t": generator.normal(3.0, 1.0, (seeds, 60))}
        a = {"t": b["t"] - 0.2 + lucky + rows + generator.normal(0.0, 0.1, (seeds, 60))}
        found = paired.difference(a, b, draws=1000)
        inside += found.low <= -0.2 <= found.high
    assert inside >= 0.92 * count, f"covers {inside / count:.2f}: are seeds and rows both counted?"


def test_one_seed_has_no_interval():
    found = paired.difference({"t": np.array([[1.0, 3.0]])}, {"t": np.ones((1, 2))})
    assert found.value == pytest.approx(1.0)
    assert np.isnan([found.low, found.high, found.error]).all()
    assert not found.sure, "sure of a difference that another seed may turn round"


def test_a_draw_that_is_unknown_counts_at_either_end():
    sample = np.concatenate([np.linspace(0, 1, 991), np.full(10, np.nan)])
    low, high = paired.interval(sample, 0.9)  # 50 of 1001 draws beyond either end
    assert (low, high) == pytest.approx((0.04, 0.96), abs=0.002), "unknown draws were left out"
    assert paired.interval(sample, 0.99) == (-np.inf, np.inf)


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
    """Every draw again by loops, with the same random numbers; blocks do not change them."""
    values = [np.random.default_rng(3).normal(size=(2, 3, 4))]
    counts = np.random.default_rng(9)
    directions = counts.standard_normal((20, 3))
    squares = counts.chisquare(2, (20, 1))[:, 0]
    rows = counts.multinomial(4, np.full(4, 1 / 4), size=20)
    expected = np.zeros((2, 20))
    for k, draw in product(range(2), range(20)):
        picked = [
            np.mean([values[0][k, s, r] for r in range(4) for _ in range(rows[draw, r])])
            for s in range(3)
        ]
        mean, direction = np.mean(picked), directions[draw]
        along = sum((direction[s] - direction.mean()) * picked[s] for s in range(3))
        expected[k, draw] = mean + along / np.sqrt(3 * squares[draw])
    found = paired.resampled_means(values, draws=20, seed=9)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    monkeypatch.setattr(paired, "_BLOCK_ENTRIES", 16)  # four draws at once
    blocks = paired.resampled_means(values, draws=20_000, seed=9)
    monkeypatch.undo()
    once = paired.resampled_means(values, draws=20_000, seed=9)
    np.testing.assert_allclose(
        np.quantile(blocks, [0.1, 0.5, 0.9], axis=1),
        np.quantile(once, [0.1, 0.5, 0.9], axis=1),
        atol=0.05,
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
