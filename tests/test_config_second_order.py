"""Configs of the second order: its own defaults, and what it does not go with."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from configs import SMALLEST, changed

from influence.config_loading import dump_config, parse_config
from influence.errors import InputError

SECOND: dict[str, Any] = {**SMALLEST, "weights": {"order": 2}}
HVP: dict[str, Any] = {**SMALLEST, "weights": {"order": 2, "curvature": "hvp"}}


def test_the_second_order_brings_what_its_expansion_asks_for():
    config = parse_config(SECOND)
    found = config.gradients.normalize, config.selection.combine, config.landmarks.choose
    assert found == (False, "mean", "uniform")
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again == config, "a dumped config is another one"
    first = parse_config(SMALLEST)
    assert first.gradients.normalize, "the first order lost its unit rows"
    assert first.landmarks.choose == "certified"


@pytest.mark.parametrize(
    ("base", "key", "value", "expected"),
    [
        (SECOND, "gradients.normalize", True, "gradients.normalize: .* Taylor .* expected false"),
        (SECOND, "selection.combine", "round_robin", "selection.combine: .* expected mean"),
        (SECOND, "selection.budget", "2M tokens", "selection.budget: .* rows or a percentage"),
        (SECOND, "selection.per_source", {"a": {"max": 0.5}}, "selection.per_source: .*order: 1"),
        (SECOND, "landmarks.choose", "certified", "landmarks.choose: .* uniform or stratified"),
        (SECOND, "method", "random", "weights.order: 2 is for method: influence_distillation"),
        (HVP, "gradients.projection", "exact", "gradients.projection: exact .* fisher"),
        (HVP, "weights.directions", 5000, "weights.directions: 5000 .* landmarks.count: 4096"),
        (SMALLEST, "weights.eta", 1e-3, "weights.eta: 0.001 is for weights.order: 2"),
        (SMALLEST, "weights.curvature", "hvp", "weights.curvature: .* weights.order: 2"),
        (SMALLEST, "weights.directions", 3, "weights.directions: 3 is for weights.order: 2"),
    ],
)
def test_what_the_second_order_does_not_gochanged(base, key: str, value: Any, expected: str):
    with pytest.raises(InputError, match=expected):
        parse_config(changed(key, value, base))


def test_exact_products_with_groups_lack_those_with_every_row():
    targets = {"t": {"path": "t.jsonl", "per": "group"}}
    raw = {**SECOND, "targets": targets, "gradients": {"projection": "exact"}}
    with pytest.raises(InputError, match=r"targets\.t\.per: .* every target row"):
        parse_config(raw)
