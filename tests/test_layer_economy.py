"""Subsets of layers against brute force and scipy's rank correlation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence.datainf import LayerBlock
from influence.errors import InputError
from influence.layer_economy import (
    POSITIONS,
    Judge,
    LayerGroup,
    by_position,
    economise,
    greedy,
    module_groups,
)
from influence.memory_budget import parse_memory

N, M, G = 40, 3, 6


def parts(seed: int = 0, strength: tuple[float, ...] = (1, 5, 0.3, 2, 0.1, 1)) -> np.ndarray:
    """Influences by group: each layer has its own, some far larger than others."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(N, M, G)) * np.asarray(strength)


def groups(sizes: tuple[int, ...] = (10, 10, 10, 10, 10, 10)) -> list[LayerGroup]:
    return [LayerGroup(f"layer{i}", (i,), size) for i, size in enumerate(sizes)]


def mean_spearman(P: np.ndarray, chosen: tuple[int, ...]) -> float:
    full, some = P.sum(axis=2), P[:, :, list(chosen)].sum(axis=2)
    return float(np.mean([spearmanr(full[:, t], some[:, t])[0] for t in range(P.shape[1])]))


def test_correlations_are_scipys_mean_over_the_targets():
    P = parts()
    judge = Judge(P)
    for k in (1, 2, 5):
        for chosen in combinations(range(G), k):
            assert judge.of(chosen) == pytest.approx(mean_spearman(P, chosen), abs=1e-12)
    assert judge.of(range(G)) == pytest.approx(1.0, abs=1e-12), "layers do not add up to all"
    left = [0, 2, 4, 5]
    added = [mean_spearman(P, (1, 3, g)) for g in left]
    np.testing.assert_allclose(judge.with_each([1, 3], left), added, atol=1e-12)


def test_a_column_without_a_ranking_does_not_count():
    P = parts()
    flat = P.copy()
    flat[:, 1] = 0.0
    kept = P[:, [0, 2]]
    assert Judge(flat).of((1, 3)) == pytest.approx(Judge(kept).of((1, 3)), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_a_loop_and_near_the_best_subset(seed: int):
    P, judge = parts(seed), Judge(parts(seed))
    path = greedy(judge, groups(), 35)
    assert [len(chosen) for chosen in path] == [1, 2, 3], "the budget holds three groups"
    chosen: list[int] = []
    for step in path:
        rest = [g for g in range(G) if g not in chosen]
        chosen.append(max(rest, key=lambda g: mean_spearman(P, (*chosen, g))))
        assert step == tuple(sorted(chosen))
    best = max(mean_spearman(P, subset) for subset in combinations(range(G), 3))
    assert mean_spearman(P, path[-1]) > best - 0.03


def test_groups_of_unequal_size_stay_within_the_budget():
    sizes = (50, 20, 5, 30, 5, 10)
    for budget in (4, 5, 37, 70, 1000):
        economy = economise(parts(), groups(sizes), budget)
        if budget == 4:
            assert economy is None, "nothing fits, and that must be said"
            continue
        assert economy is not None
        for choice in economy.choices:
            assert choice.bytes == sum(sizes[g] for g in choice.groups) <= budget, choice.rule
        assert economy.chosen.spearman == max(c.spearman for c in economy.choices)
    assert economy is not None
    assert economy.chosen.spearman == pytest.approx(1.0)
    assert economy.chosen.held_out == pytest.approx(1.0)


def test_choices_by_position():
    found = {rule: by_position(rule, groups(), 30)[1:] for rule in POSITIONS}
    assert found == {
        "first": [(0, 1), (0, 1, 2)],
        "last": [(4, 5), (3, 4, 5)],
        "middle": [(2, 3), (1, 2, 3)],
        "spread": [(0, 5), (0, 2, 5)],
    }


def test_the_choice_is_held_against_rows_that_it_was_not_made_on():
    """Layers of pure noise: some rank half of the rows by chance, and the others no better."""
    draw = np.random.default_rng(5)
    noise = draw.normal(size=(16, 1, 30))
    economy = economise(noise, [LayerGroup(str(i), (i,), 1) for i in range(30)], 2)
    assert economy is not None
    both = [c for c in economy.choices if c.rule == "greedy"][-1]
    assert both.spearman == pytest.approx(mean_spearman(noise[::2], both.groups), abs=1e-12)
    assert both.held_out == pytest.approx(mean_spearman(noise[1::2], both.groups), abs=1e-12)
    assert both.spearman > both.held_out + 0.2


def test_both_factors_of_a_module_are_one_group():
    names = [
        "m.layers.0.q_proj.lora_A.default.weight",
        "m.layers.0.q_proj.lora_B.default.weight",
        "m.layers.0.mlp.up.weight",
        "m.layers.0.mlp.up.bias",
        "m.layers.1.q_proj.lora_A.default.weight",
        "scale",
    ]
    blocks = [LayerBlock(name, 10 * i, 10, 99) for i, name in enumerate(names)]
    found = module_groups(blocks)
    assert [(g.name, g.layers, g.bytes) for g in found] == [
        ("m.layers.0.q_proj", (0, 1), 80),
        ("m.layers.0.mlp.up", (2, 3), 80),
        ("m.layers.1.q_proj", (4,), 40),
        ("scale", (5,), 40),
    ]


def test_memory_is_a_share_or_bytes():
    assert parse_memory("12.5%") == (0.125, None)
    assert parse_memory(" 20 GB") == (None, 20e9)
    assert parse_memory(1000) == (None, 1000.0)
    for text in ("0%", "101%", "ten", "5 gb", "0 MB", -1, ""):
        with pytest.raises(InputError, match=r"layer_economy\.memory"):
            parse_memory(text)
