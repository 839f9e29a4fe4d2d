"""What `evaluation.downstream` makes of losses: perplexities, pairs, intervals, the judge."""

from __future__ import annotations

import numpy as np
import pytest

from influence.evaluations.downstream_results import compare, pairs, perplexities
from influence.evaluations.own_run import merged
from influence.paired import difference


def test_perplexity_counts_every_token_alike() -> None:
    """Of rows with 1 and 3 tokens, the exponential of the mean over all four tokens."""
    tokens = [np.array([2.0]), np.array([1.0, 4.0, 1.0])]
    losses = np.array([[each.mean() for each in tokens]])
    found = perplexities(losses, np.array([1.0, 3.0]))
    assert found == pytest.approx(np.exp(np.concatenate(tokens).mean()))


def test_comparisons_are_those_of_each_pair_alone() -> None:
    generator = np.random.default_rng(0)
    names = ("untrained", "random", "a", "b", "full")
    shift = dict(zip(names, (3.0, 1.0, 0.8, 0.9, 0.4), strict=True))
    losses = {
        name: [shift[name] + 0.1 * generator.normal(size=(3, rows)) for rows in (6, 4)]
        for name in names
    }
    results, contrasts, judge = compare(losses, "random", draws=400)
    assert [(c.of, c.against) for c in contrasts] == [
        ("a", "random"),
        ("b", "random"),
        ("full", "random"),
        ("untrained", "random"),
        ("a", "b"),
        ("a", "full"),
        ("b", "full"),
    ]
    for c in contrasts:
        tests = ("t0", "t1")
        of, against = (dict(zip(tests, losses[n], strict=True)) for n in (c.of, c.against))
        alone = difference(of, against, draws=400)
        assert (c.value, c.low, c.high) == pytest.approx((alone.value, alone.low, alone.high)), (
            f"{c.of} - {c.against}: not the pair's own bootstrap"
        )
        by_seed = np.mean([(of[t] - against[t]).mean(axis=1) for t in tests], axis=0)
        assert c.error == pytest.approx(by_seed.std(ddof=1) / np.sqrt(3))
        assert c.seeds_needed is not None
        error = by_seed.std(ddof=1) / np.sqrt(c.seeds_needed)
        assert error == pytest.approx(abs(c.value) / 5), "another number of seeds than asked for"
    means = {n: np.mean([each.mean() for each in losses[n]]) for n in names}
    for name in ("random", "a", "b"):
        gain = results[name].gain
        assert gain is not None
        assert gain.value == pytest.approx(
            (means["untrained"] - means[name]) / (means["untrained"] - means["full"])
        )
        assert gain.low is not None
        assert gain.high is not None
        assert gain.low < gain.value < gain.high
    assert judge is not None
    assert pairs(["untrained", "a", "b"], "b") == [("a", "b"), ("untrained", "b")]


def test_one_seed_says_nothing_of_noise() -> None:
    losses = {name: [np.array([[1.0, 2.0, 4.0]]) + i] for i, name in enumerate(("random", "a"))}
    losses["untrained"] = [np.full((1, 3), 9.0)]
    results, contrasts, judge = compare(losses, "random", draws=50)
    assert results["a"].loss.error is None
    assert results["a"].gain is None, "a part of a gain that nobody measured"
    assert (contrasts[0].error, contrasts[0].seeds_needed, judge) == (None, None, None)


def test_overrides_are_put_over_a_section_key_by_key() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3}, "g": 4}
    found = merged(base, {"a": {"c": {"x": 5}}, "e": None, "g": {"h": 6}})
    assert found == {"a": {"b": 1, "c": {"d": 2, "x": 5}}, "e": None, "g": {"h": 6}}
    assert base["a"] == {"b": 1, "c": {"d": 2}}
