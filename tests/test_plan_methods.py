"""Plans of the methods without gradients against the runs that follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plan_runs import planned_and_run
from tiny_run import Setup, third_target, tiny_config

from influence.calibration import measure_speeds
from influence.errors import InputError
from influence.plan import Plan, make_plan

FIRST = ("catalogue", "contamination")


def test_a_run_of_perplexity_computes_what_its_plan_lists(setup: Setup, tmp_path: Path) -> None:
    """First run, the other rank, a new target: the losses are computed once."""

    def step(name: str, **changes: Any) -> Plan:
        settings = {"cache": str(tmp_path / "cache"), "method": "perplexity", **changes}
        return planned_and_run(tiny_config(setup, tmp_path / name, **settings))

    first = step("first")
    assert list(first.work.stages) == [*FIRST, "losses", "scores", "selection"]
    losses = first.bill.stages["losses"]
    assert losses.planned.flops, "a forward pass for nothing"
    assert losses.planned.seconds > 0
    assert first.bill.set_up == "assumed", "the model is loaded in no time"
    top = step("top", perplexity={"rank": "top"})
    assert top.work.stages["losses"].least.shards == 0, "another rank would cost losses"
    assert top.bill.set_up == "", "a model is loaded for nothing"
    target = step("target", targets={**setup.targets, "third": third_target(tmp_path)})
    assert target.work.stages["losses"].least.shards == 0, "no target changes a loss"


def test_a_run_of_semantic_computes_what_its_plan_lists(
    setup: Setup, tmp_path: Path, encoder: str
) -> None:
    """First run, again, a new target: its rows alone are encoded."""

    def step(name: str, **changes: Any) -> Plan:
        settings = {"cache": str(tmp_path / "cache"), "method": "semantic", **changes}
        settings["semantic"] = {"encoder": encoder}
        return planned_and_run(tiny_config(setup, tmp_path / name, **settings))

    first = step("first")
    assert list(first.work.stages) == [*FIRST, "sentences", "scores", "selection"]
    assert first.bill.stages["sentences"].planned.flops
    assert first.shape is None, "no language model is looked at"
    assert first.memory is None
    assert step("again").work.stages["sentences"].least.shards == 0
    target = step("target", targets={**setup.targets, "third": third_target(tmp_path)})
    assert target.work.stages["sentences"].least.shards == 1, "not the new target's rows alone"
    assert target.work.stages["sentences"].least.rows == 3


@pytest.mark.parametrize("method", ["length", "random"])
def test_a_run_of_the_catalogue_alone_computes_nothing_else(
    setup: Setup, tmp_path: Path, method: str
) -> None:
    plan = planned_and_run(tiny_config(setup, tmp_path / "run", method=method))
    assert list(plan.work.stages) == [*FIRST, "selection"]
    assert plan.bill.total.planned.flops is None, "a model would run"


def test_the_speed_of_losses_can_be_measured_and_that_of_no_model_not(
    setup: Setup, tmp_path: Path, encoder: str
) -> None:
    config = tiny_config(setup, tmp_path / "run", method="perplexity")
    measured = measure_speeds(config, 6)
    assert list(measured.stages) == ["losses"], "other stages than the run's were measured"
    assert measured.stages["losses"].seconds > 0
    plan = make_plan(config, [measured])
    assert plan.bill.stages["losses"].speed.startswith("measured in plan --measure")
    for method in ("semantic", "length"):
        changes: dict[str, Any] = {"method": method, "semantic": {"encoder": encoder}}
        with pytest.raises(InputError, match=f"method {method} runs no model"):
            measure_speeds(tiny_config(setup, tmp_path / method, **changes), 6)
