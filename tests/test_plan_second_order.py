"""The second order's plan against its run: directions, products with them, the offset's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optimizer_training import Trained, changes_of
from test_plan_runs import BYTES, COUNTED, OTHER_BYTES, planned_and_run
from tiny_run import Setup, manifest_of, tiny_config

from influence.config import Config
from influence.one_process import run_select
from influence.plan import make_plan


def _config(setup: Setup, lora: Trained, folder: Path, weights: dict[str, Any]) -> Config:
    targets = {"sums": {**setup.targets["sums"], "per": "group"}}
    changes = {**changes_of(lora), "weights": weights, "data__limit": 24, "targets": targets}
    return tiny_config(setup, folder / "run", cache=str(folder / "cache"), **changes)


def test_fisher_costs_the_products_with_the_offset_and_nothing_else(
    setup: Setup, lora: Trained, tmp_path: Path
) -> None:
    plan = planned_and_run(_config(setup, lora, tmp_path, {"order": 2}))
    assert plan.work.stages["offset_products"].least.shards == 1
    assert "second_order" in plan.work.stages


def test_directions_are_counted_before_it_is_known_which_they_are(
    setup: Setup, lora: Trained, tmp_path: Path
) -> None:
    weights = {"order": 2, "curvature": "hvp", "directions": 3}
    config = _config(setup, lora, tmp_path, weights)
    plan = make_plan(config)
    assert any("directions" in note for note in plan.notes), "nothing says what is not known"
    run_select(config, quiet=True)
    bill = manifest_of(config.run).bill
    assert bill is not None
    assert bill.stages.keys() == plan.bill.stages.keys()
    for name in ("offset_products", "offset_vector", "directions", "hessian_products"):
        stage = bill.stages[name]
        assert stage.took is not None
        assert stage.planned.shards, f"{name} is not in the plan"
        for what in COUNTED:
            planned, took = getattr(stage.planned, what), getattr(stage.took, what)
            if what == "objects" and name == "directions":
                took += 3  # the weights of each, which lie beside the run
            if planned is not None and took is not None:
                assert took == planned, f"{name}: {what} planned {planned}, took {took}"
        near = BYTES.get(name, OTHER_BYTES)
        assert stage.took.written_bytes == pytest.approx(stage.planned.written_bytes, rel=near)
