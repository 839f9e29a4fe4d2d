"""The benchmark of one weighted step, whole, on the tiny model: predictions against real steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, tiny_config, write_config

from influence.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import one_step
import one_step_runs

ETAS = {"sgd": [0.01, 0.1], "adamw": [2e-4, 1e-3]}
NAMES = {f"{kind}_{what}" for kind in ETAS for what in ("first", "fisher", "hvp")}


@pytest.fixture(scope="module")
def words(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line: six runs of twenty rows after a warm-up, their target's rows as dev."""
    folder = tmp_path_factory.mktemp("one-step")
    config = tiny_config(
        setup,
        folder / "runs" / "base",
        cache=str(folder / "cache"),
        targets={"sums": {**setup.targets["sums"], "per": "group"}},
        method="exact",
        warmup={"fraction": 0.5, "rank": 4, "learning_rate": 0.02, "batch_size": 4},
        data__limit=20,
        selection__budget=6,
        selection__combine="mean",
        gradients__projection="none",
        gradients__normalize=False,
    )
    return [
        f"--config={write_config(folder / 'config.yaml', config)}",
        *(f"--curvature={curvature}" for curvature in one_step_runs.CURVATURES),
        f"--dev=dev={setup.targets['sums']['path']}",
        f"--test=test={setup.targets['mixed']['path']}",
        *(f"--eta={kind}={eta!r}" for kind, etas in ETAS.items() for eta in etas),
        "--threads=1",
        f"--out={folder / 'out'}",
        "--directions=20",
    ]


@pytest.fixture(scope="module")
def tried(words: list[str]) -> dict[str, Any]:
    assert one_step.main(words) == 0
    found = json.loads(Path(words[-2].partition("=")[2], "all.json").read_text())
    assert found["results"].keys() == NAMES
    return found["results"]


def test_a_step_does_what_its_expansion_says(tried: dict[str, Any]) -> None:
    """To the third order of the step: what is left of the shorter one is less than a twentieth."""
    for name, result in tried.items():
        step = result["tried"][0]
        left = abs(step["dev"] - step["second"])
        assert left < 0.05 * abs(step["first"]), (
            f"{name}: the step is not the predicted one: {step}"
        )


def test_the_model_is_as_it_was_after_every_step(tried: dict[str, Any]) -> None:
    assert len({json.dumps(result["before"]) for result in tried.values()}) == 1


def test_a_run_says_of_its_weights_what_the_exact_expansion_does(tried: dict[str, Any]) -> None:
    """hvp with directions that span every row; fisher has the slope, and another curvature."""
    for kind, etas in ETAS.items():
        for curvature in one_step_runs.CURVATURES:
            result = tried[f"{kind}_{curvature}"]
            said, own = result["said"], result["tried"][-1]
            assert (said["curvature"], said["eta"]) == (result["curvature"], max(etas))
            assert said["predicted_first"] == pytest.approx(own["first"], rel=1e-3)
            if curvature == "hvp":
                assert said["predicted_second"] == pytest.approx(own["second"], rel=1e-3)


def test_what_is_done_is_not_done_again(tried: dict[str, Any], words: list[str]) -> None:
    out = Path(words[-2].partition("=")[2])
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*_*.json")}
    assert one_step.main(words) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*_*.json")} == before


def test_runs_with_other_settings_are_not_taken_for_these(
    tried: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_step.main([*words, "--set=selection.budget=7"]) == InputError.exit_code
    assert "selection.budget" in capsys.readouterr().out


def test_step_sizes_are_of_both_optimizers_or_of_one() -> None:
    found = one_step_runs.parse_etas(["0.1", "adamw=1e-4"])
    assert found == {"sgd": [0.1], "adamw": [0.1, 1e-4]}
    for value in ("adam=0.1", "adamw=", "0", "nan", "sgd=fast"):
        with pytest.raises(InputError, match=r"--eta .* sgd, adamw"):
            one_step_runs.parse_etas([value])


def test_nothing_to_try_is_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert one_step.main(words[1:]) == InputError.exit_code
    assert "there is nothing to try" in capsys.readouterr().out
