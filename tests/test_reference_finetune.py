"""`reference.finetune`: the job makes its reference model, once, whatever dies, for all runs."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from own_training_scene import (
    SECONDS,
    assert_it_took_what_was_planned,
    bill_of,
    in_other_places,
    kill_in_training,
    own_of,
)
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    tiny_config,
    write_config,
)

from influence import own_training_run
from influence.cache_listing import make_listing, scan_cache
from influence.cache_prune import plan_prune
from influence.cache_use import recorded_use, use_of
from influence.config import Config
from influence.errors import InputError
from influence.finetune_job import run_finetune
from influence.one_process import run_select
from influence.plan import make_plan
from influence.plan_schemas import StageBill
from influence.vector_export import export_vectors
from ray_jobs import select as select_job

pytestmark = pytest.mark.clusters

SETTINGS: dict[str, Any] = {"rank": 4, "learning_rate": 0.02, "batch_size": 4, "dropout": 0.1}
IN2CORE: dict[str, Any] = {"method": "in2core", "gradients__layer_dim": 16}
OWN: dict[str, Any] = {**IN2CORE, "reference__finetune": SETTINGS}


@pytest.fixture(scope="module")
def own(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StageBill]:
    """A run that makes its reference, and what was planned of that before."""
    folder = tmp_path_factory.mktemp("own")
    config = tiny_config(setup, folder / "run", cache=str(folder / "cache"), **OWN)
    plan = make_plan(config)
    assert any("it is fine-tuned first" in note for note in plan.notes)
    run_select(config, quiet=True)
    return config, plan.bill.stages["reference"]


def test_it_is_the_one_that_finetune_makes(
    own: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    apart = tiny_config(
        setup,
        tmp_path / "apart",
        finetune={**SETTINGS, "data": "pool", "evaluate": {}, "output": str(tmp_path / "adapter")},
    )
    record = run_finetune(apart, quiet=True)
    named = {**IN2CORE, "reference__adapter": str(tmp_path / "adapter")}
    other = tiny_config(setup, tmp_path / "named", **named)
    run_select(other, quiet=True)
    assert_same_results(own[0].run, other.run, "the job trains on other rows or settings")
    made = manifest_of(own[0].run).reference
    assert made is not None
    assert not made.reused
    assert (made.record.tokens, made.record.steps) == (record.tokens, record.total_steps)
    first, last = made.record.epoch_losses[0], made.record.epoch_losses[-1]
    assert last < first, "the reference learned nothing of the pool"


def test_what_it_took_is_what_was_planned_and_is_shown(own: tuple[Config, StageBill]) -> None:
    config, planned = own
    assert_it_took_what_was_planned(config, planned)
    page = Path(config.run, "report.html").read_text()
    assert "fine-tuned on <strong>68</strong> rows of the pool" in page
    assert "This run made it." in page


def test_a_changed_path_reuses_it_and_a_changed_setting_does_not(
    own: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    first = own[0]
    moved = tiny_config(
        setup,
        tmp_path / "moved",
        **{**OWN, "reference__finetune": {**SETTINGS, "token_budget": 300, "save_every": 3}},
        cache=first.cache,
        **in_other_places(setup, tmp_path),
    )
    assert make_plan(moved).work.stages["reference"].least.tokens is None, "it is planned again"
    run_select(moved, quiet=True)
    manifest = manifest_of(moved.run)
    assert manifest.reference is not None
    assert manifest.reference.reused, "a path, a micro-batch or a target made it train again"
    assert manifest.stages["reference"].tokens == 0
    assert bill_of(moved).cached == 1
    assert "An earlier run on this cache made it." in Path(moved.run, "report.html").read_text()
    changes = {"learning_rate": 0.01}, {"fraction": 0.5}, {"seed": 3}, {"weights": False}
    keys = {_print_of(first)}
    for change in changes:
        other = {**OWN, "reference__finetune": {**SETTINGS, **change}}
        keys.add(_print_of(tiny_config(setup, tmp_path / "other", **other, cache=first.cache)))
    keys.add(_print_of(tiny_config(setup, tmp_path / "other", **OWN, data__limit=50)))
    assert len(keys) == len(changes) + 2, "a change that trains another adapter is not seen"
    part = {**OWN, "reference__finetune": {**SETTINGS, "fraction": 0.5}}
    half = tiny_config(setup, tmp_path / "half", **part, cache=first.cache)
    planned = make_plan(half).bill.stages["reference"].planned
    run_select(half, quiet=True)
    stage = manifest_of(half.run).stages["reference"]
    assert 30 <= stage.rows <= 36, "half of 72 rows, less those that cannot be trained on"
    assert (stage.rows, stage.tokens) == (planned.rows, planned.tokens)


def _print_of(config: Config) -> str:
    return own_of(config).fingerprint.hex


def test_the_cache_lists_it_and_keeps_it_for_whom_it_is(
    own: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    config = own[0]
    cache = config.cache_url
    path = write_config(tmp_path / "job.yaml", config)
    contents = scan_cache(cache)
    assert not contents.foreign, f"no part of a reference model: {contents.foreign}"
    for use in (use_of(path, cache), recorded_use(config.run)):
        entries = [e for e in make_listing(contents, [use]).fingerprints if e.used_by]
        assert "reference" in {entry.stage for entry in entries}, f"{use.label}: not its own"
        assert all(
            place[0] != "reference" or place[1] != _print_of(config)
            for place in plan_prune(contents, use.places, timedelta(0)).doomed
        )
    doomed = plan_prune(contents, (), timedelta(0)).doomed
    assert ("reference", _print_of(config)) in doomed, "what nobody uses stays for ever"
    unmade = {**OWN, "reference__finetune": {**SETTINGS, "rank": 2}}
    fresh = tiny_config(setup, tmp_path / "fresh", **unmade, cache=cache)
    with pytest.raises(InputError, match="not in the cache yet"):
        export_vectors(fresh, "gradients", str(tmp_path / "out"), command="x")


def test_a_run_killed_in_the_training_goes_on_to_the_same_result(
    own: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    changes = {**OWN, "reference__finetune": {**SETTINGS, "save_every": 2}}
    config = tiny_config(setup, tmp_path / "run", **changes)
    reference = kill_in_training(config, tmp_path, steps=6)
    run_select(config, quiet=True)
    stage = manifest_of(config.run).stages["reference"]
    whole = bill_of(own[0]).planned.tokens
    assert whole is not None
    assert 0 < stage.tokens < whole, "it began anew"
    assert_same_results(own[0].run, config.run, "the training that went on ended elsewhere")
    # What is damaged is not trusted, though its marker is there.
    weights = Path(reference.url, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert Path(reference.url, reference.kind.marker).exists()
    run_select(config, quiet=True)
    assert manifest_of(config.run).stages["reference"].tokens == whole
    assert_same_results(own[0].run, config.run, "a damaged reference was used")


def test_two_runs_at_once_make_one(
    own: tuple[Config, StageBill],
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_training_run, "_LOOK_EVERY_SECONDS", 0.05)
    cache = str(tmp_path / "cache")
    configs = [tiny_config(setup, tmp_path / name, **OWN, cache=cache) for name in ("a", "b")]
    failed: list[BaseException] = []

    def run(config: Config) -> None:
        try:
            run_select(config, quiet=True)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not failed, failed
    uses = [manifest_of(config.run).reference for config in configs]
    assert sorted(use is not None and use.reused for use in uses) == [False, True]
    for config in configs:
        assert_same_results(own[0].run, config.run, "two drivers wrote one adapter")


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_and_as_its_own_target(
    own: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    # The same model as the target: its reference is in the cache already.
    target = {"model": {"name": str(setup.model)}, "finetune": SETTINGS, "pilot": 1000}
    config = tiny_config(setup, tmp_path / "ray", **OWN, transfer=target)
    select_job.run_select(config, quiet=True)
    manifest = manifest_of(config.run)
    assert manifest.reference is not None
    assert manifest.stages["reference"].tokens > 0
    assert_same_results(own[0].run, config.run, "workers of Ray train otherwise")
    transfer = json.loads(Path(config.run, "transfer.json").read_text())
    assert transfer["adapter"] == manifest.reference.url, "trained once more for the same"
    for column in transfer["columns"]:
        assert column["spearman"]["value"] == pytest.approx(1.0)


def test_with_everything_in_s3(own: tuple[Config, StageBill], setup: Setup, s3_url: str) -> None:
    config = tiny_config(setup, f"{s3_url}/run", **OWN)
    run_select(config, quiet=True)
    made = manifest_of(config.run).reference
    assert made is not None
    assert made.url.startswith(s3_url)
    assert_same_results(own[0].run, config.run, "the store changed the reference")
