"""What a selection takes with an empty cache: against runs that have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, manifest_of, tiny_config

from influence.cold_cost import ColdCost, cold_cost
from influence.one_process import run_select

WARM = {"fraction": 0.3, "epochs": 1, "rank": 2, "batch_size": 4, "learning_rate": 0.01}


def cost_of(setup: Setup, run: Path, cache: Path, **changes: Any) -> ColdCost:
    found: list[ColdCost] = []
    config = tiny_config(setup, run, cache=str(cache), **changes)
    run_select(config, quiet=True, after=lambda job, reduce: found.append(cold_cost(job, reduce)))
    return found[0]


def taken(run: Path) -> dict[str, float]:
    """Operations by stage that a run recorded as computed."""
    bill = manifest_of(str(run)).bill
    assert bill is not None
    took = {name: stage.took for name, stage in bill.stages.items()}
    return {name: each.flops for name, each in took.items() if each is not None and each.flops}


def operations(cost: ColdCost) -> dict[str, float]:
    return {name: stage.flops for name, stage in cost.stages.items() if stage.flops}


@pytest.mark.parametrize("choose", ["uniform", "certified"])
def test_shards_of_other_rows_do_not_count(setup: Setup, tmp_path: Path, choose: str) -> None:
    """Landmarks that are read from the shards of all rows cost what they cost by themselves."""
    changes = {"landmarks__choose": choose, "landmarks__count": 24, "landmarks__initial": 12}
    alone = cost_of(setup, tmp_path / "alone", tmp_path / "empty", **changes)
    assert operations(alone) == taken(tmp_path / "alone"), "an empty cache is the cold one"
    cost_of(setup, tmp_path / "all", tmp_path / "full", method="exact")
    after = cost_of(setup, tmp_path / "after", tmp_path / "full", **changes)
    stages = manifest_of(str(tmp_path / "after")).stages
    assert stages["gradients"].borrowed_rows > 0, "the scene is not as it should be"
    assert stages["gradients"].computed == 0
    assert operations(after) == operations(alone), "a lender's other rows are counted"
    assert after.stages["gradients"].seconds > 0
    assert not after.assumed


def test_a_warm_up_counts_wherever_it_was_made(setup: Setup, tmp_path: Path) -> None:
    first = cost_of(setup, tmp_path / "first", tmp_path / "cache", warmup=WARM)
    again = cost_of(setup, tmp_path / "again", tmp_path / "cache", warmup=WARM)
    assert manifest_of(str(tmp_path / "again")).stages["warmup"].reused == 1
    assert operations(first) == pytest.approx(taken(tmp_path / "first"))
    assert operations(again) == operations(first)
    assert again.stages["warmup"] == first.stages["warmup"], (
        "a cache hit's time, not the training's"
    )
    assert again.stages["warmup"].seconds > 0
    assert again.flops == sum(operations(again).values())
    assert again.seconds > again.stages["warmup"].seconds
