"""LoRA fine-tuning of a tiny model: the mathematics, and going on after an interruption."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from random_rows import encoded, row_loss
from safetensors.torch import load_file
from tiny_models import tiny_model

from influence.errors import InputError
from influence.finetune import adapted, finetune
from influence.finetune_settings import FinetuneSettings
from influence.finetune_steps import Steps, rate_factor
from influence.optimizer_state import load_adam_state
from influence.training_data import TrainingRows
from influence.training_progress import TrainingProgress
from influence.training_record import TrainingRecord

LENGTHS = (9, 14, 6, 11, 8, 5, 12)
WEIGHTS = np.array([2.0, 0.5, 1.0, 1.5, 0.5, 1.2, 0.3])
SETTINGS = FinetuneSettings(rank=4, batch_size=3, learning_rate=0.01, token_budget=28, seed=3)
ROWS = encoded(LENGTHS)
HELD_OUT = {"held": encoded((7, 12, 10), seed=1), "other": encoded((6, 6), seed=2)}

Train = Callable[..., Path]


class Stopping(TrainingProgress):
    """Prints nothing; stops the training after a step as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        super().__init__(quiet=True)
        self._after = after
        self.begun_at: int | None = None

    def begin(self, done: int, total: int, per_epoch: int) -> None:
        self.begun_at = done

    def step(self, done: int, loss: float, tokens: int, seconds: float) -> None:
        if done == self._after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """float64, where rounding cannot hide a mistake, and float32."""
    return {
        "float64": tiny_model("llama", torch.float64),
        "float32": tiny_model("llama", torch.float32),
    }


@pytest.fixture
def train(tmp_path: Path, models: dict[str, Any]) -> Train:
    """train(rows, settings, ...) -> the output folder; a fresh one unless `output` is given."""

    def once(
        rows: TrainingRows,
        settings: FinetuneSettings = SETTINGS,
        sets: Any = None,
        dtype: str = "float64",
        output: Path | None = None,
        **others: Any,
    ) -> Path:
        made = len(list(tmp_path.iterdir()))
        output = output or tmp_path / f"out{made}"
        finetune(models[dtype], rows, sets or {}, settings, str(output), **others)
        return output

    return once


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter_model.safetensors")


def record_of(output: Path) -> TrainingRecord:
    return TrainingRecord.model_validate_json((output / "training.json").read_text())


def assert_close(one: Path, other: Path, why: str, atol: float = 1e-9) -> None:
    first, second = adapter_of(one), adapter_of(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=0, atol=atol, msg=lambda text, n=name: f"{why}: {n}\n{text}"
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_training_is_adamw_on_the_weighted_mean_of_the_rows_losses(
    train: Train, models: dict[str, Any], reduction: Any
) -> None:
    settings = replace(SETTINGS, reduction=reduction, weight_decay=0.1)
    output = train(TrainingRows.of(ROWS, WEIGHTS), settings)
    weights = WEIGHTS * len(WEIGHTS) / WEIGHTS.sum()
    tokens = np.array([row.n_response_tokens for row in ROWS])
    scale = {"mean": np.ones(len(ROWS)), "sum": tokens, "sqrt": np.sqrt(tokens)}[reduction]
    steps = Steps(len(ROWS), 3, 2.0, 3)
    with adapted(models["float64"], settings, None) as model:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
        expected = []
        for step in range(steps.total):
            optimizer.param_groups[0]["lr"] = 0.01 * rate_factor(step, steps.total, 0.1, "linear")
            optimizer.zero_grad()
            rows = steps.rows_of(step)
            losses = [weights[i] * scale[i] * row_loss(model, ROWS[i]) for i in rows]
            loss = torch.stack(losses).sum() / len(rows)
            loss.backward()
            expected.append(float(loss.detach()))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        found = adapter_of(output)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = found[name.replace(".default", "")]
                torch.testing.assert_close(value, parameter.detach(), rtol=0, atol=1e-9)
        state = load_adam_state(str(output), model)
        for (name, parameter), live in zip(
            [(n, p) for n, p in model.named_parameters() if p.requires_grad],
            [optimizer.state[p] for p in parameters],
            strict=True,
        ):
            assert parameter is not None
            for moments, key in ((state.exp_avg, "exp_avg"), (state.exp_avg_sq, "exp_avg_sq")):
                torch.testing.assert_close(moments[name], live[key], rtol=1e-6, atol=1e-12)
        assert state.step == steps.total
    logged = [step.loss for step in record_of(output).steps]
    np.testing.assert_allclose(logged, expected, rtol=1e-5, err_msg="the record tells other losses")


def test_equal_weights_and_rows_of_weight_zero_change_no_bit(train: Train) -> None:
    plain = train(TrainingRows.of(ROWS), dtype="float32")
    equal = train(TrainingRows.of(ROWS, np.full(len(ROWS), 0.37)), dtype="float32")
    extra = [*encoded((13,), seed=5), *ROWS]
    zero = train(TrainingRows.of(extra, np.append(0.0, np.full(len(ROWS), 2.0))), dtype="float32")
    for output, why in ((equal, "equal weights"), (zero, "a row of weight 0")):
        same = (output / "adapter_model.safetensors").read_bytes()
        assert same == (plain / "adapter_model.safetensors").read_bytes(), f"{why} had an effect"
    assert record_of(zero).rows.left_out == {"weight 0": 1}, "left out, but not counted"


def test_a_weight_of_two_is_the_row_twice(train: Train) -> None:
    whole = replace(SETTINGS, batch_size=100, epochs=4)
    weights = np.ones(len(ROWS))
    weights[2] = 2.0
    assert_close(
        train(TrainingRows.of(ROWS, weights), whole),
        train(TrainingRows.of([*ROWS, ROWS[2]]), whole),
        "a weight is no multiplicity",
    )


def test_how_a_step_is_cut_and_padded_does_not_matter(train: Train) -> None:
    rows = TrainingRows.of(ROWS, WEIGHTS)
    whole = train(rows, replace(SETTINGS, token_budget=10_000))
    single = train(rows, replace(SETTINGS, token_budget=1))
    assert_close(whole, single, "micro-batches, or their padding, change the step")
    again = train(rows, replace(SETTINGS, gradient_checkpointing=True))
    assert_close(whole, again, "gradient checkpointing changes the gradients")


def test_a_seed_fixes_the_adapter_and_the_model_is_left_as_it_was(
    train: Train, models: dict[str, Any]
) -> None:
    model = models["float32"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    rows = TrainingRows.of(ROWS, WEIGHTS)
    outputs = [train(rows, replace(SETTINGS, seed=seed), dtype="float32") for seed in (1, 2, 1)]
    data = [(output / "adapter_model.safetensors").read_bytes() for output in outputs]
    assert data[0] == data[2], "something besides the seed decides"
    assert data[0] != data[1], "the seed has no effect"
    after = model.state_dict()
    assert after.keys() == before.keys(), "the adapter is still in the model"
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert modules == [type(module) for module in model.modules()]
    assert all(p.requires_grad for p in model.parameters()), "the model stays frozen"
    assert not model.training


#: With dropout: its noise must not depend on what a process drew before.
PIECES = replace(SETTINGS, epochs=4, save_every=2, dropout=0.2, evaluate_every=5)


@pytest.fixture(scope="module")
def in_one_piece(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training that every other way to the same result must equal."""
    output = tmp_path_factory.mktemp("whole")
    rows = TrainingRows.of(ROWS, WEIGHTS)
    finetune(models["float32"], rows, HELD_OUT, PIECES, str(output))
    return output


def assert_same_training(output: Path, whole: Path) -> None:
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    one, other = record_of(whole), record_of(output)
    assert one.evaluations == other.evaluations
    assert [s.loss for s in one.steps] == [s.loss for s in other.steps]
    assert [s.step for s in other.steps] == list(range(1, one.total_steps + 1))


def test_a_training_killed_before_its_result_is_written_has_the_whole_record(
    train: Train, in_one_piece: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last checkpoint; the record that is there then is that of the one before."""

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    rows, output = TrainingRows.of(ROWS, WEIGHTS), tmp_path / "killed"
    with monkeypatch.context() as patched:
        patched.setattr("influence.finetune._Run._publish", kill)
        with pytest.raises(Killed):
            train(rows, PIECES, HELD_OUT, "float32", output)
    before, whole = record_of(output), record_of(in_one_piece)
    assert len(before.steps) < whole.total_steps, "the test no longer kills in between"
    train(rows, PIECES, HELD_OUT, "float32", output)
    assert_same_training(output, in_one_piece)
    assert record_of(output).tokens == whole.tokens, "the last steps are not in the record"


@pytest.mark.parametrize("stopped_after", [1, 7, 12])
def test_a_training_in_two_pieces_equals_one_in_one(
    train: Train, in_one_piece: Path, tmp_path: Path, stopped_after: int
) -> None:
    rows, output = TrainingRows.of(ROWS, WEIGHTS), tmp_path / "in-pieces"
    with pytest.raises(KeyboardInterrupt):
        train(rows, PIECES, HELD_OUT, "float32", output, watcher=Stopping(stopped_after))
    assert record_of(output).state == "interrupted"
    assert not (output / "adapter_model.safetensors").exists(), "a result before the end"
    torch.manual_seed(99)
    second = Stopping(0)
    train(rows, PIECES, HELD_OUT, "float32", output, watcher=second)
    saved = (stopped_after - 1) // 2 * 2  # the step that was stopped was not saved yet
    assert second.begun_at == saved, "it did not go on from the newest checkpoint"
    assert_same_training(output, in_one_piece)
    assert not list((output / "checkpoints").rglob("*.*")), "checkpoints of a finished training"


def test_damaged_checkpoints_are_passed_over(
    train: Train, in_one_piece: Path, tmp_path: Path
) -> None:
    rows, output = TrainingRows.of(ROWS, WEIGHTS), tmp_path / "damaged"
    settings = replace(PIECES, keep_checkpoints=None)
    with pytest.raises(KeyboardInterrupt):
        train(rows, settings, HELD_OUT, "float32", output, watcher=Stopping(9))
    cut, gone, unmarked = (output / "checkpoints" / f"{step:08d}" for step in (4, 6, 8))
    (cut / "optimizer.pt").write_bytes((cut / "optimizer.pt").read_bytes()[:-1])
    (gone / "adapter_model.safetensors").unlink()
    (unmarked / "complete.json").unlink()
    second = Stopping(0)
    train(rows, settings, HELD_OUT, "float32", output, watcher=second)
    assert second.begun_at == 2, "a damaged checkpoint was taken, or a whole one was not"
    assert_same_training(output, in_one_piece)


def test_checkpoints_stay_as_asked(train: Train) -> None:
    for keep, stay in ((None, [2, 4, 5]), (2, [4, 5]), (0, [])):
        settings = replace(SETTINGS, epochs=5 / 3, save_every=2, keep_checkpoints=keep)
        output = train(TrainingRows.of(ROWS), settings, dtype="float32")
        marked = sorted(path.parent.name for path in output.glob("checkpoints/*/complete.json"))
        assert [int(name) for name in marked] == stay, f"keep_checkpoints={keep}"


def test_other_arguments_are_refused_with_both_values(train: Train) -> None:
    rows = TrainingRows.of(ROWS)
    settings = replace(SETTINGS, save_every=1)
    output = train(rows, settings, HELD_OUT, "float32").parent / "begun"
    with pytest.raises(KeyboardInterrupt):
        train(rows, settings, HELD_OUT, "float32", output, watcher=Stopping(3))
    changed: list[tuple[str, Any]] = [
        ("settings.rank: was 4, now 5", {"settings": replace(settings, rank=5)}),
        ("settings.seed: was 3, now 4", {"settings": replace(settings, seed=4)}),
        ("rows.content: was", {"rows": TrainingRows.of(ROWS, WEIGHTS)}),
        ("rows.trained: was 7, now 6", {"rows": TrainingRows.of(ROWS[1:])}),
        ("evaluation.held: was", {"sets": {"other": HELD_OUT["other"]}}),
        ("model: was None, now 'm'", {"identity": {"model": "m"}}),
    ]
    for text, changes in changed:
        arguments = {"rows": rows, "settings": settings, "sets": HELD_OUT, **changes}
        with pytest.raises(InputError) as caught:
            train(**arguments, dtype="float32", output=output)
        assert text in str(caught.value), f"not named: {caught.value}"
        assert "--replace" in str(caught.value)
    free = replace(settings, token_budget=9, save_every=4, gradient_checkpointing=True)
    train(rows, free, HELD_OUT, "float32", output)
    done = record_of(output)
    assert done.done
    again = Stopping(1)
    train(rows, free, HELD_OUT, "float32", output, watcher=again)
    assert again.begun_at is None, "a finished training was done again"


def test_held_out_losses_against_plain_loops(train: Train, models: dict[str, Any]) -> None:
    output = train(TrainingRows.of(ROWS), SETTINGS, HELD_OUT)
    evaluations = record_of(output).evaluations
    assert [each.step for each in evaluations] == [0, 3, 6], "not before, every epoch, and after"
    trained = PeftModel.from_pretrained(tiny_model("llama", torch.float64), str(output))
    for place, model in ((0, models["float64"]), (-1, trained)):
        for name, rows in HELD_OUT.items():
            with torch.no_grad():
                losses = [float(row_loss(model, row)) for row in rows]
            tokens = [int(row.response_mask[1:].sum()) for row in rows]
            mean = sum(x * n for x, n in zip(losses, tokens, strict=True)) / sum(tokens)
            found = evaluations[place].sets[name]
            assert found.loss == pytest.approx(np.mean(losses), rel=1e-9)
            assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-9)
            assert (found.rows, found.response_tokens) == (len(rows), sum(tokens))
    changes = [evaluations[-1].sets[n].loss != evaluations[0].sets[n].loss for n in HELD_OUT]
    assert all(changes), "the adapter is not in what is evaluated"


def test_training_goes_on_from_an_adapter(train: Train) -> None:
    first = train(TrainingRows.of(ROWS), SETTINGS, HELD_OUT)
    second = train(
        TrainingRows.of(ROWS[:3]),
        replace(SETTINGS, rank=2),
        HELD_OUT,
        adapter=str(first),
        identity={"adapter": "a"},
    )
    begin, end = record_of(second).evaluations[0], record_of(first).evaluations[-1]
    assert begin.sets["held"].loss == pytest.approx(end.sets["held"].loss, rel=1e-9)
    shapes = {name: value.shape for name, value in adapter_of(first).items()}
    assert {n: v.shape for n, v in adapter_of(second).items()} == shapes, "its rank is in force"
    assert any(not torch.equal(v, adapter_of(first)[n]) for n, v in adapter_of(second).items())


def test_a_loss_that_is_not_finite_ends_the_training_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    with pytest.raises(InputError, match=r"loss of step 1 is .*learning_rate"):
        finetune(model, TrainingRows.of(ROWS), {}, SETTINGS, str(tmp_path / "out"))
    assert record_of(tmp_path / "out").state == "failed"
    model = tiny_model("llama", torch.float32)
    settings = replace(SETTINGS, target_modules=["no_such_proj"])
    with pytest.raises(InputError, match="no_such_proj"):
        finetune(model, TrainingRows.of(ROWS), {}, settings, str(tmp_path / "none"))
    with pytest.raises(InputError, match="no row can be trained on"):
        finetune(model, TrainingRows.of([]), {}, SETTINGS, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("gpt2", torch.float32), ("mixtral", torch.float32), ("qwen3", torch.bfloat16)],
)
def test_other_models_learn_their_rows(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, dtype)
    settings = replace(SETTINGS, epochs=12, evaluate_every=1000)
    finetune(model, TrainingRows.of(ROWS), {"same": ROWS}, settings, str(tmp_path))
    before, after = record_of(tmp_path).losses("same")
    assert before is not None
    assert after is not None
    assert after < before - 0.5, f"{architecture} learned nothing: {before} to {after}"
    kinds = {value.dtype for value in adapter_of(tmp_path).values()}
    assert kinds == {torch.float32}, "the factors of a bfloat16 model have no room for small steps"
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
