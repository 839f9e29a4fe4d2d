"""The warm-up's checkpoints: what there is after each epoch, with the rate that it was made at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Setup, manifest_of, tiny_config

from influence import trainer_lora
from influence.checkpoints import ADAPTER_FILES, epoch_folder
from influence.config import Config
from influence.finetune_steps import Steps, epoch_rates
from influence.one_process import run_select
from influence.optimizer_state import load_adam_state
from influence.own_training import own_training
from influence.plan import make_plan
from influence.replica import load_replica

SETTINGS: dict[str, Any] = {
    "fraction": 0.5,
    "rank": 2,
    "learning_rate": 0.02,
    "batch_size": 8,
    "dropout": 0.1,
    "epochs": 3,
    "keep_epochs": True,
}
STEADY: dict[str, Any] = {**SETTINGS, "schedule": "constant", "warmup_ratio": 0}


def with_warmup(setup: Setup, folder: Path, settings: dict[str, Any]) -> Config:
    return tiny_config(setup, folder / "run", cache=str(folder / "cache"), warmup=settings)


def record_of(config: Config) -> Any:
    made = manifest_of(config.run).warmup
    assert made is not None
    return made.record


def url_of(config: Config) -> str:
    own = own_training(config)
    assert own is not None
    return own.url


@pytest.fixture(scope="module")
def steady(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three epochs at one rate."""
    config = with_warmup(setup, tmp_path_factory.mktemp("steady"), STEADY)
    run_select(config, quiet=True)
    return config


def test_they_are_what_shorter_trainings_end_with(
    steady: Config, setup: Setup, tmp_path: Path
) -> None:
    for epochs in (1, 2, 3):
        own = {**STEADY, "epochs": epochs, "keep_epochs": False}
        shorter = with_warmup(setup, tmp_path / str(epochs), own)
        run_select(shorter, quiet=True)
        kept, result = Path(url_of(steady), epoch_folder(epochs)), Path(url_of(shorter))
        name = ADAPTER_FILES[1]
        same = (kept / name).read_bytes() == (result / name).read_bytes()
        assert same, f"the checkpoint of epoch {epochs} is not what training had come to then"
        model = setup_model(steady, str(result))
        states = [load_adam_state(str(each), model) for each in (kept, result)]
        assert states[0].step == states[1].step == epochs * record_of(steady).steps // 3
        for name, moment in states[0].exp_avg_sq.items():
            assert torch.equal(moment, states[1].exp_avg_sq[name]), (
                f"{name}: the state beside the checkpoint of epoch {epochs} is not its own"
            )


def setup_model(config: Config, adapter: str) -> Any:
    model = config.model.model_copy(update={"adapter": adapter})
    return load_replica(model, "float32", "cpu").model


def test_their_rates_are_means_of_the_rates_that_were_taken(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []

    class Recorded(trainer_lora.LoraTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            optimizer: Any = self.optimizer
            taken.append(optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(trainer_lora, "LoraTrainer", Recorded)
    config = with_warmup(setup, tmp_path, {**SETTINGS, "epochs": 2.5})
    run_select(config, quiet=True)
    record = record_of(config)
    assert len(taken) == record.steps
    per_epoch = -(-record.rows // 8)
    assert record.steps == -(-5 * per_epoch // 2)
    assert [each.folder for each in record.checkpoints] == [epoch_folder(k) for k in (1, 2, 3)]
    for k, each in enumerate(record.checkpoints):
        own = taken[k * per_epoch : (k + 1) * per_epoch]
        assert each.learning_rate == pytest.approx(sum(own) / len(own), rel=1e-12)
        assert each.step == min(record.steps, (k + 1) * per_epoch)
    assert len({each.learning_rate for each in record.checkpoints}) == 3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_mean_rates_add_up_to_all_rates(schedule: str) -> None:
    steps = Steps(37, 8, 3.4, seed=1)
    means = epoch_rates(steps, 0.3, 0.2, schedule)
    sizes = [end - first for first, end in zip([0, *steps.ends], steps.ends, strict=False)]
    one = epoch_rates(Steps(37, 37 * 8, 17, seed=1), 0.3, 0.2, schedule)
    assert sum(sizes) == steps.total == len(one)
    total = sum(mean * size for mean, size in zip(means, sizes, strict=True))
    assert total == pytest.approx(sum(one), rel=1e-12), "a step's rate is lost or counted twice"


def test_a_training_that_was_stopped_leaves_the_same_ones(
    steady: Config, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_warmup(setup, tmp_path, {**STEADY, "save_every": 3})
    whole = trainer_lora.LoraTrainer.training_step

    def stops(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_lora.LoraTrainer, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run_select(config, quiet=True)
    url = Path(url_of(config))
    first = url / epoch_folder(1) / ADAPTER_FILES[1]
    assert first.is_file(), "what an epoch ended with waits for the end of training"
    own = own_training(config)
    assert own is not None
    assert not own.there, "it counts before it is whole"
    run_select(config, quiet=True)
    tokens = manifest_of(config.run).stages["warmup"].tokens
    assert 0 < tokens < record_of(config).tokens, "it began anew"
    assert record_of(config).files == record_of(steady).files, "other checkpoints than in one go"
    assert record_of(config).checkpoints == record_of(steady).checkpoints


def test_one_that_is_damaged_is_made_again(steady: Config, tmp_path: Path) -> None:
    before = record_of(steady)
    cache = shutil.copytree(steady.cache_url, tmp_path / "cache")
    config = steady.model_copy(update={"run": str(tmp_path / "run"), "cache": str(cache)})
    damaged = Path(url_of(config), epoch_folder(2), ADAPTER_FILES[1])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    own = own_training(config)
    assert own is not None
    assert not own.there, "a damaged checkpoint is trusted"
    run_select(config, quiet=True)
    assert manifest_of(config.run).stages["warmup"].tokens == before.tokens
    assert record_of(config).files == before.files


def test_they_are_planned_and_told_apart_from_the_result_alone(
    steady: Config, setup: Setup, tmp_path: Path
) -> None:
    fresh = with_warmup(setup, tmp_path, STEADY)
    plan = make_plan(fresh).bill.stages["warmup"].planned
    bill = manifest_of(steady.run).bill
    assert bill is not None
    took = bill.stages["warmup"].took
    assert took is not None
    assert plan.objects == took.objects, "planned objects are not those that were written"
    assert plan.written_bytes == pytest.approx(took.written_bytes, rel=0.3)
    alone = with_warmup(setup, tmp_path, {**STEADY, "keep_epochs": False})
    assert url_of(fresh) != url_of(alone), "one that lacks checkpoints stands for one with them"
    without = {key: value for key, value in STEADY.items() if key != "keep_epochs"}
    assert url_of(alone) == url_of(with_warmup(setup, tmp_path, without))
