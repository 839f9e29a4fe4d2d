"""In2Core's plan against its run: gradients by layer, DataInf's sums, scores, a pilot's choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plan_runs import BYTES, COUNTED, OTHER_BYTES, planned_and_run
from tiny_run import Setup, manifest_of, tiny_config

from influence.one_process import run_select
from influence.plan import make_plan

VARIANTS: dict[str, dict[str, Any]] = {
    "layerwise": {"gradients__projection": "layerwise", "gradients__layer_dim": 16},
    "none": {"gradients__projection": "none"},
    "token_max": {"gradients__projection": "none", "gradients__reduction": "token_max"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_in2core_does_what_the_plan_lists(
    setup: Setup, tmp_path: Path, adapter: str, variant: str
) -> None:
    changes: dict[str, Any] = {"method": "in2core", "reference__adapter": adapter}
    changes |= {**VARIANTS[variant], "cache": str(tmp_path / "cache")}
    first = planned_and_run(tiny_config(setup, tmp_path / "first", **changes))
    scores = "token_scores" if variant == "token_max" else "scores"
    for name in ("gradients", "curvature", scores):
        assert first.work.stages[name].least.shards, f"{name} is not in the plan"
        assert first.work.stages[name].least.effort > 0
    again = planned_and_run(tiny_config(setup, tmp_path / "again", **changes))
    assert again.work.stages["gradients"].least.shards == 0, "the same run costs gradients again"
    assert bool(again.bill.set_up) == (variant == "token_max"), "models are loaded for tokens alone"


def test_layers_that_a_pilot_chooses_are_planned_with_it(
    setup: Setup, tmp_path: Path, adapter: str
) -> None:
    changes: dict[str, Any] = {"method": "in2core", "model__adapter": adapter}
    changes |= {"gradients__layer_dim": 16, "layers": "auto", "layer_economy": {"pilot": 40}}
    changes["cache"] = str(tmp_path / "cache")
    config = tiny_config(setup, tmp_path / "auto", **changes)
    plan = make_plan(config)
    assert any("layers: auto" in note for note in plan.notes)
    run_select(config, quiet=True)
    bill = manifest_of(config.run).bill
    assert bill is not None
    assert bill.stages.keys() == plan.bill.stages.keys()
    stage = bill.stages["gradients"]
    assert stage.took is not None
    for what in COUNTED:
        planned, took = getattr(stage.planned, what), getattr(stage.took, what)
        assert took == planned, f"{what} planned {planned}, took {took}"
    assert stage.took.rows == 40 + 72 + 2 * 11, "pilot, pool, and the targets of either"
    assert stage.took.written_bytes == pytest.approx(stage.planned.written_bytes, rel=0.3)
    assert bill.stages["layers"].took is not None
    again = tiny_config(setup, tmp_path / "again", **changes)
    told = make_plan(again)
    assert told.work.stages["gradients"].least.shards == 0, "what was chosen before is not known"
    run_select(again, quiet=True)
    done = manifest_of(again.run).bill
    assert done is not None
    took = done.stages["gradients"].took
    assert took is not None
    assert took.shards == 0
    scores = done.stages["curvature"]
    assert scores.took is not None
    assert scores.took.written_bytes == pytest.approx(
        scores.planned.written_bytes, rel=BYTES["scores"] + OTHER_BYTES
    )
