"""The warm-up: made once, of the rows and settings asked for, and used by every later stage."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adam_states import compare
from own_training_scene import (
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
    save_adapter,
    save_model,
    tiny_config,
    write_config,
)

from influence import trainer_lora
from influence.cache_listing import make_listing, scan_cache
from influence.cache_prune import plan_prune
from influence.cache_use import recorded_use, use_of
from influence.checkpoints import ADAPTER_FILES, OPTIMIZER_FILE
from influence.config import Config, OptimizerConfig
from influence.config_evaluation import GroupInfluenceConfig
from influence.errors import InputError
from influence.finetune_job import run_finetune
from influence.one_process import run_evaluate, run_select
from influence.optimizer_state import load_adam_state
from influence.own_training import planned_training
from influence.plan import make_plan
from influence.plan_schemas import StageBill
from influence.replica import load_replica
from influence.vector_export import export_vectors
from influence.warmup import with_warmup
from ray_jobs import select as select_job

pytestmark = pytest.mark.clusters

SETTINGS: dict[str, Any] = {
    "fraction": 0.5,
    "rank": 4,
    "learning_rate": 0.02,
    "batch_size": 4,
    "dropout": 0.1,
}
WARM: dict[str, Any] = {"warmup": SETTINGS}
ADAMW = OptimizerConfig(kind="adamw")


@pytest.fixture(scope="module")
def warm(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StageBill]:
    """A run that makes its warm-up, and what was planned of that before."""
    folder = tmp_path_factory.mktemp("warm")
    config = tiny_config(setup, folder / "run", cache=str(folder / "cache"), **WARM)
    plan = make_plan(config)
    assert any("warmup: it is fine-tuned first" in note for note in plan.notes)
    for stage in ("embedding", "gradients"):
        assert plan.bill.stages[stage].cached == 0
    run_select(config, quiet=True)
    return config, plan.bill.stages["warmup"]


def by_hand(setup: Setup, run: Path, output: Path) -> Config:
    """`influence finetune` with the same settings on the same rows."""
    section = {**SETTINGS, "data": "pool", "evaluate": {}, "output": str(output)}
    return tiny_config(setup, run, finetune=section)


def test_it_is_the_one_that_finetune_makes_and_the_scores_are_of_it(
    warm: tuple[Config, StageBill],
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live: dict[str, Any] = {}

    class Recorded(trainer_lora.LoraTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            done = super().train(*args, **kwargs)
            assert self.model is not None
            live["names"] = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            live["optimizer"] = self.optimizer
            return done

    monkeypatch.setattr(trainer_lora, "LoraTrainer", Recorded)
    record = run_finetune(by_hand(setup, tmp_path / "apart", tmp_path / "adapter"), quiet=True)
    made = manifest_of(warm[0].run).warmup
    assert made is not None
    assert not made.reused
    assert (made.record.tokens, made.record.steps) == (record.tokens, record.total_steps)
    assert made.record.epoch_losses[-1] < made.record.epoch_losses[0], "it learned nothing"
    for name in (*ADAPTER_FILES, OPTIMIZER_FILE):
        same = Path(made.url, name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
        assert same, f"{name}: the job trains on other rows, with other settings or another seed"
    named = tiny_config(
        setup,
        tmp_path / "named",
        model__adapter=str(tmp_path / "adapter"),
        gradients__parameters="lora",
    )
    run_select(named, quiet=True)
    assert_same_results(warm[0].run, named.run, "the scores are not of the warm-up's model")

    model = warm[0].model.model_copy(update={"adapter": made.url})
    replica = load_replica(model, "float32", "cpu")
    optimizer = getattr(live["optimizer"], "optimizer", live["optimizer"])
    state = load_adam_state(made.url, replica.model)
    compare(state, live["names"], optimizer)
    assert state.step == record.total_steps, "the state is not of the last step"


def test_its_state_is_the_optimizers_where_adamw_has_no_other(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run", **WARM)
    adamw = config.model_copy(update={"optimizer": ADAMW})
    done = with_warmup(adamw, "made")
    assert (done.model.adapter, done.optimizer.state) == ("made", "made")
    assert with_warmup(config, "made").optimizer.state is None, "plain descent has no state"
    given = ADAMW.model_copy(update={"state": "given"})
    kept = with_warmup(config.model_copy(update={"optimizer": given}), "made")
    assert kept.optimizer.state == "given", "a state that the config names was put aside"
    with planned_training(adamw) as (ready, own):
        assert own is not None
        assert not own.there
        assert ready.optimizer.state == ready.model.adapter
        replica = load_replica(ready.model, "float32", "cpu")
        blank = load_adam_state(str(ready.optimizer.state), replica.model)
        factors = {n for n, _ in replica.model.named_parameters() if "lora_" in n}
    assert factors
    assert blank.exp_avg_sq.keys() == factors, "what is planned with has other moments"


def test_what_it_took_is_what_was_planned_and_is_shown(warm: tuple[Config, StageBill]) -> None:
    config, planned = warm
    assert_it_took_what_was_planned(config, planned)
    page = Path(config.run, "report.html").read_text()
    rows = manifest_of(config.run).stages["warmup"].rows
    assert 30 <= rows <= 36, "half of 72 rows, less those that cannot be trained on"
    assert '<section id="warmup"><h2>Warm-up</h2>' in page
    assert f"fine-tuned on <strong>{rows}</strong> rows of the pool, a random part of" in page
    assert "This run made it." in page


def test_other_methods_and_targets_share_it(
    warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    first = warm[0]
    other = tiny_config(
        setup,
        tmp_path / "other",
        method="exact",
        warmup={**SETTINGS, "token_budget": 300, "save_every": 3},
        cache=first.cache,
        **in_other_places(setup, tmp_path),
    )
    assert make_plan(other).work.stages["warmup"].least.tokens is None, "it is planned again"
    run_select(other, quiet=True)
    manifest = manifest_of(other.run)
    assert manifest.warmup is not None
    assert manifest.warmup.reused, "a path, a micro-batch, a method or a target made it train again"
    assert manifest.stages["warmup"].tokens == 0
    assert bill_of(other).cached == 1
    reused = manifest.stages["gradients"]
    assert reused.borrowed_rows + reused.reused, "the first run's gradients are not its"
    assert "An earlier run on this cache made it." in Path(other.run, "report.html").read_text()


def test_what_changes_it_is_told_apart(
    warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    first = own_of(warm[0])
    assert first.there
    run = tmp_path / "other"
    changes: dict[str, dict[str, Any]] = {
        "learning rate": {"warmup": {**SETTINGS, "learning_rate": 0.01}},
        "fraction": {"warmup": {**SETTINGS, "fraction": 0.25}},
        "its seed": {"warmup": {**SETTINGS, "seed": 3}},
        "the seed": {**WARM, "seed": 4},
        "weights": {"warmup": {**SETTINGS, "weights": False}},
        "pool": {**WARM, "data__limit": 50},
        "model": {**WARM, "model__name": str(save_model(tmp_path / "model", seed=5))},
        "adapter": {**WARM, "model__adapter": save_adapter(tmp_path / "lora", setup.model)},
    }
    keys = {name: own_of(tiny_config(setup, run, **each)).key for name, each in changes.items()}
    for name, key in keys.items():
        assert key != first.key, f"a change of {name} trains another adapter and is not seen"
    assert len(set(keys.values())) == len(changes), "two different adapters have one folder"
    fewer = tiny_config(setup, run, **WARM, targets={"only": setup.targets["sums"]})
    assert own_of(fewer).key == first.key, "a target made it train again"


def test_it_goes_on_from_the_models_adapter_and_finetune_does_not_from_it(
    warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "lora", setup.model)
    further = tiny_config(setup, tmp_path / "further", **WARM, model__adapter=adapter)
    run_select(further, quiet=True)
    made = manifest_of(further.run).warmup
    assert made is not None
    assert made.record.values["adapter"], "the fingerprint does not know of the adapter"
    model = warm[0].model.model_copy(update={"adapter": made.url})
    factors = load_replica(model, "float32", "cpu").model.named_parameters()
    ranks = {p.shape[0] for n, p in factors if "lora_A" in n}
    assert ranks == {3}, "fresh factors instead of those of model.adapter"

    # A fine-tuning on the selection is of the model as the config names it.
    section = {**SETTINGS, "fraction": 1, "evaluate": {}, "output": str(tmp_path / "tuned")}
    tuned = warm[0].model_copy(update={"finetune": warm[0].finetune.model_copy(update=section)})
    plain = tiny_config(setup, tmp_path / "plain", finetune=section)
    record = run_finetune(tuned, quiet=True)
    assert record.identity["adapter"] is None, "it went on from the warm-up unasked"
    data = {"output": str(tmp_path / "again"), "data": [f"{warm[0].run}/selection/part-*.parquet"]}
    again = plain.model_copy(update={"finetune": plain.finetune.model_copy(update=data)})
    run_finetune(again, quiet=True)
    name = ADAPTER_FILES[1]
    assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_evaluations_are_of_the_model_after_it(
    warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    config = warm[0]
    asked = config.evaluation.model_copy(update={"group_influence": GroupInfluenceConfig()})
    evaluated = config.model_copy(update={"evaluation": asked})
    about = run_evaluate(evaluated, quiet=True)["group_influence"]["about"]
    made = own_of(config)
    assert about["adapter"] == made.url, "the selection is judged by another model's gradients"
    assert manifest_of(f"{config.run}/evaluations/group_influence").stages["gradients"].computed
    path = str(tmp_path / "job.yaml")
    given = evaluated.model_dump(mode="json", exclude_unset=True)
    Path(path).write_text(yaml.safe_dump(given))
    contents = scan_cache(config.cache_url)
    doomed = plan_prune(contents, use_of(path, config.cache_url).places, timedelta(0)).doomed
    # Others here have compared the rows with other targets.
    lost = [place for place in doomed if place[0] != "contamination"]
    assert not lost, "a prune loses gradients of the evaluation"
    fresh = {"cache": str(tmp_path / "cache"), "evaluation": {"group_influence": {}}}
    with pytest.raises(InputError, match="the warm-up is not in the cache yet"):
        run_evaluate(tiny_config(setup, tmp_path / "fresh", **WARM, **fresh), quiet=True)


def test_the_cache_lists_it_and_keeps_it_for_whom_it_is(
    warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    config = warm[0]
    cache, key = config.cache_url, own_of(config).fingerprint.hex
    path = write_config(tmp_path / "job.yaml", config)
    contents = scan_cache(cache)
    assert not contents.foreign, f"no part of a warm-up: {contents.foreign}"
    for use in (use_of(path, cache), recorded_use(config.run)):
        entries = [e for e in make_listing(contents, [use]).fingerprints if e.used_by]
        assert "warmup" in {entry.stage for entry in entries}, f"{use.label}: not its own"
        assert ("warmup", key) not in plan_prune(contents, use.places, timedelta(0)).doomed
    doomed = plan_prune(contents, (), timedelta(0)).doomed
    assert ("warmup", key) in doomed, "what nobody uses stays for ever"
    unmade = tiny_config(setup, tmp_path / "fresh", warmup={**SETTINGS, "rank": 2}, cache=cache)
    with pytest.raises(InputError, match="warmup: the warm-up is not in the cache yet"):
        export_vectors(unmade, "gradients", str(tmp_path / "out"), command="x")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup__target_modules": ["nowhere"]}, "^warmup.target_modules: "),
        ({"model__dtype": "float16"}, "^warmup.dtype: .* set warmup.dtype"),
        ({"warmup__workers": 2}, "^warmup.workers: 2 workers need Ray"),
        ({"warmup__adapter": "/nowhere"}, "^warmup.adapter: "),
    ],
)
def test_what_cannot_be_trained_is_refused_with_its_keys(
    setup: Setup, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    config = tiny_config(setup, tmp_path / "run", warmup={**SETTINGS}, **changes)
    with pytest.raises(InputError, match=expected):
        run_select(config, quiet=True)


def test_a_run_killed_in_the_warmup_goes_on_to_the_same_result(
    warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path
) -> None:
    changes = {"warmup": {**SETTINGS, "save_every": 2}}
    config = tiny_config(setup, tmp_path / "run", **changes)
    own = kill_in_training(config, tmp_path, steps=4)
    run_select(config, quiet=True)
    stage = manifest_of(config.run).stages["warmup"]
    whole = bill_of(warm[0]).planned.tokens
    assert whole is not None
    assert 0 < stage.tokens < whole, "it began anew"
    assert_same_results(warm[0].run, config.run, "the training that went on ended elsewhere")
    for name in (*ADAPTER_FILES, OPTIMIZER_FILE):
        same = Path(own.url, name).read_bytes() == Path(own_of(warm[0]).url, name).read_bytes()
        assert same, f"{name} is another one than of a training in one go"
    # A state that is damaged is not trusted, though the marker is there.
    state = Path(own.url, OPTIMIZER_FILE)
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    assert not own_of(config).there
    run_select(config, quiet=True)
    assert manifest_of(config.run).stages["warmup"].tokens == whole
    assert torch.load(state, weights_only=True)["state"], "the damaged state stayed"


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray(warm: tuple[Config, StageBill], setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "ray", **WARM)
    select_job.run_select(config, quiet=True)
    assert manifest_of(config.run).stages["warmup"].tokens > 0
    assert_same_results(warm[0].run, config.run, "workers of Ray train otherwise")
