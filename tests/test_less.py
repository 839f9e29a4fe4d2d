"""LESS: whole runs against its formula in loops, over the checkpoints of a real warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_scores_of_runs import Oracle, tokens_and_labels
from tiny_run import (
    Setup,
    manifest_of,
    messages_of,
    score_column,
    scores_of,
    selection_of,
    tiny_config,
)

from influence.checkpoints import epoch_folder
from influence.config import Config
from influence.one_process import run_select
from influence.optimizer_state import load_adam_state
from influence.own_training import own_training

WARM: dict[str, Any] = {
    "fraction": 0.5,
    "rank": 2,
    "learning_rate": 0.02,
    "batch_size": 8,
    "epochs": 2,
}
SUB_TASKS = ("sums", "mixed/x", "mixed/y")


def less_config(setup: Setup, run: Path, cache: Path, **changes: Any) -> Config:
    given = {"warmup": WARM, "gradients": {"projection": "none"}, **changes}
    return tiny_config(setup, run, method="less", cache=str(cache), **given)


@pytest.fixture(scope="module")
def whole(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with two checkpoints whose vectors are not projected."""
    folder = tmp_path_factory.mktemp("less")
    config = less_config(setup, folder / "run", folder / "cache", model__dtype="float64")
    run_select(config, quiet=True)
    return config


def warmup_of(config: Config) -> str:
    own = own_training(config)
    assert own is not None
    return own.url


class Formula:
    """Gamma and the plain gradients of a checkpoint, a row at a time, in float64."""

    def __init__(self, setup: Setup, folder: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.rows = Oracle(setup)
        base = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float64)
        self.model: Any = PeftModel.from_pretrained(base, folder).double().eval()
        self.state = load_adam_state(folder, self.model)
        named = [(n, p) for n, p in self.model.named_parameters() if "lora_" in n]
        self.names = [name for name, _p in named]
        self.weights = [p.requires_grad_(True) for _n, p in named]

    def gradients(self, row: dict[str, Any]) -> list[torch.Tensor]:
        ids, labels = tokens_and_labels(messages_of(row), self.rows.tokenizer)
        loss = self.model(input_ids=ids, labels=labels).loss
        return list(torch.autograd.grad(loss, self.weights))

    def target(self, row: dict[str, Any]) -> torch.Tensor:
        """The unit gradient."""
        flat = torch.cat([g.flatten() for g in self.gradients(row)])
        return flat / flat.norm()

    def candidate(self, row: dict[str, Any]) -> torch.Tensor:
        """The unit step that torch's AdamW takes by this row alone."""
        steps = []
        for name, gradient in zip(self.names, self.gradients(row), strict=True):
            moved = torch.nn.Parameter(torch.zeros_like(gradient))
            optimizer = torch.optim.AdamW([moved], lr=1.0, weight_decay=0.0)
            optimizer.state[moved] = {
                "step": torch.tensor(float(self.state.steps[name])),
                "exp_avg": self.state.exp_avg[name].double().clone(),
                "exp_avg_sq": self.state.exp_avg_sq[name].double().clone(),
            }
            moved.grad = gradient
            optimizer.step()
            steps.append(-moved.detach().flatten())
        flat = torch.cat(steps)
        return flat / flat.norm()

    def cosines(self) -> dict[str, np.ndarray]:
        """By sub-task: every candidate's mean cosine with its rows."""
        targets = self.rows.targets
        groups = {
            "sums": targets["sums"],
            "mixed/x": [row for row in targets["mixed"] if row["family"] == "x"],
            "mixed/y": [row for row in targets["mixed"] if row["family"] == "y"],
        }
        candidates = [self.candidate(row) for row in self.rows.rows.values()]
        found = {}
        for name, members in groups.items():
            units = [self.target(row) for row in members]
            found[name] = np.asarray(
                [np.mean([float(each @ unit) for unit in units]) for each in candidates]
            )
        return found


def formula_scores(config: Config, setup: Setup) -> tuple[list[str], dict[str, np.ndarray]]:
    """(ids, scores by sub-task): sum_j lr_j cos / sum_j lr_j, by loops."""
    made = manifest_of(config.run).warmup
    assert made is not None
    rates = [each.learning_rate for each in made.record.checkpoints]
    assert len(rates) == 2
    assert abs(rates[0] / rates[1] - 1) > 0.2, "the rates are too alike to tell weights by"
    total: dict[str, np.ndarray] = {}
    ids: list[str] = []
    for k, rate in enumerate(rates):
        formula = Formula(setup, str(Path(made.url, epoch_folder(k + 1))))
        ids = list(formula.rows.rows)
        for name, values in formula.cosines().items():
            total[name] = total.get(name, 0.0) + rate / sum(rates) * values
    return ids, total


def test_scores_are_the_formula_and_the_largest_decides(whole: Config, setup: Setup) -> None:
    ids, wanted = formula_scores(whole, setup)
    table = scores_of(whole.run)
    where = [table.column("id").to_pylist().index(each) for each in ids]
    for name in SUB_TASKS:
        np.testing.assert_allclose(
            score_column(whole.run, f"score.{name}")[where],
            wanted[name],
            rtol=1e-4,
            atol=1e-6,
            err_msg=f"score.{name}: another update, other weights of checkpoints or another mean",
        )
    largest = np.max([wanted[name] for name in SUB_TASKS], axis=0)
    found = score_column(whole.run, "score")[where]
    np.testing.assert_allclose(found, largest, rtol=1e-4, err_msg="not the largest sub-task's")
    scores = score_column(whole.run, "score")
    best = np.sort(scores[~np.isnan(scores)])[::-1][:10]
    chosen = [row["influence_score"] for row in selection_of(whole.run)]
    np.testing.assert_allclose(chosen, best, err_msg="the selection is not the top of the ranking")
    assert {row["influence_weight"] for row in selection_of(whole.run)} == {1.0}
