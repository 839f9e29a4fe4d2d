"""Transfer: the reference's ranking against the target model's own, on a pilot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_run import (
    N_SCORED,
    Setup,
    manifest_of,
    save_model,
    score_column,
    shards_in,
    tiny_config,
    write_config,
)

from influence.cache_use import use_of
from influence.errors import InputError
from influence.intervals import spearman_interval
from influence.one_process import run_select
from influence.plan import make_plan
from influence.transfer import draw_pilot

SETTINGS = {"rank": 4, "learning_rate": 0.02, "batch_size": 4, "epochs": 1}


def transfer_of(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "transfer.json").read_text())


def test_a_model_agrees_with_itself_on_a_pilot_of_everything(
    setup: Setup, tmp_path: Path, adapter: str
) -> None:
    model = {"name": str(setup.model), "adapter": adapter}
    config = tiny_config(
        setup,
        tmp_path / "run",
        method="in2core",
        gradients__layer_dim=16,
        reference__adapter=adapter,
        transfer={"model": model, "pilot": 1000},
    )
    run_select(config, quiet=True)
    found = transfer_of(config.run)
    assert found["pilot"] == N_SCORED
    assert {column["name"] for column in found["columns"]} >= {"sums", "mixed"}
    for column in found["columns"]:
        assert column["rows"] == N_SCORED
        assert column["spearman"]["value"] == pytest.approx(1.0), "other rows are compared"


def test_another_model_is_asked_for_its_own_ranking(setup: Setup, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=5)
    changes: dict[str, Any] = {
        "method": "in2core",
        "gradients__layer_dim": 16,
        "reference__finetune": SETTINGS,
        "cache": str(tmp_path / "cache"),
    }
    trained = tiny_config(
        setup,
        tmp_path / "trained",
        transfer={"model": {"name": str(other)}, "finetune": SETTINGS, "pilot": 40},
        **changes,
    )
    assert any("a pilot of 40 rows" in note for note in make_plan(trained).notes)
    run_select(trained, quiet=True)
    found = transfer_of(trained.run)
    nested = f"{trained.run}/transfer"
    assert found["adapter"] is not None
    assert found["parameters"] == "lora"
    made = manifest_of(trained.run).reference
    assert made is not None
    assert found["adapter"] != made.url, "the reference's adapter on another model"
    pilot = [json.loads(line) for line in Path(nested, "pilot.jsonl").read_text().splitlines()]
    positions = [int(row["id"]) for row in pilot]
    for column in found["columns"]:
        mine = score_column(trained.run, f"score.{column['name']}")[positions]
        theirs = score_column(nested, f"score.{column['name']}")
        rho = float(spearmanr(mine, theirs)[0])
        assert column["spearman"]["value"] == pytest.approx(rho)
        assert abs(rho) < 0.999, "the other model was never asked"
        low, high = spearman_interval(rho, 40)
        assert (column["spearman"]["low"], column["spearman"]["high"]) == pytest.approx((low, high))
    page = Path(trained.run, "report.html").read_text()
    assert "Transfer to the target model" in page

    plain = tiny_config(
        setup,
        tmp_path / "plain",
        transfer={"model": {"name": str(other)}, "pilot": 12},
        **changes,
    )
    run_select(plain, quiet=True)
    assert transfer_of(plain.run)["parameters"] == "linear", "without an adapter: its own weights"


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        ({"model": {"name": "nowhere/model"}}, r"^transfer\.model\.name: 'nowhere/model' is no"),
        (
            {"model": {"name": "{model}", "adapter": "{model}"}},
            r"^transfer\.model\.adapter: .* has",
        ),
        (
            {"model": {"name": "{model}", "dtype": "float16"}, "finetune": {}},
            r"^transfer\.finetune\.dtype: the gradients of float16",
        ),
    ],
)
def test_a_target_model_that_is_not_there_is_named_before_anything_is_computed(
    setup: Setup, tmp_path: Path, adapter: str, transfer: dict[str, Any], expected: str
) -> None:
    transfer["model"] = {
        key: value.replace("{model}", str(setup.model)) for key, value in transfer["model"].items()
    }
    config = tiny_config(
        setup, tmp_path / "run", method="in2core", reference__adapter=adapter, transfer=transfer
    )
    with pytest.raises(InputError, match=expected):
        run_select(config, quiet=True)
    assert not (tmp_path / "run").exists(), "the whole selection was made first"


def test_a_prune_that_keeps_a_config_keeps_what_its_transfer_uses(
    setup: Setup, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", seed=5)
    config = tiny_config(
        setup,
        tmp_path / "run",
        method="in2core",
        gradients__layer_dim=16,
        reference__finetune=SETTINGS,
        transfer={"model": {"name": str(other)}, "finetune": SETTINGS, "pilot": 8},
    )
    run_select(config, quiet=True)
    path = write_config(tmp_path / "job.yaml", config)
    kept = set(use_of(path, config.cache_url).places)
    held = {(key.split("/")[0], key.split("/")[1]) for key in shards_in(config.cache_url)}
    held |= {("reference", p.name) for p in Path(config.cache_url, "reference").iterdir()}
    assert len([place for place in held if place[0] == "reference"]) == 2
    assert held <= kept, f"it would remove {sorted(held - kept)}"


def test_a_pilot_is_a_seeded_draw_of_scored_rows() -> None:
    scored = np.ones(200, dtype=bool)
    scored[::3] = False
    drawn = draw_pilot(scored, 30, 0)
    assert (np.diff(drawn) > 0).all()
    assert scored[drawn].all()
    assert (drawn == draw_pilot(scored, 30, 0)).all()
    assert (drawn != draw_pilot(scored, 30, 1)).any()
