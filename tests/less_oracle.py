"""LESS by its formula in loops: a row at a time, in float64, over the checkpoints of a warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_scores_of_runs import Oracle, tokens_and_labels
from tiny_run import Setup, manifest_of, messages_of

from influence.checkpoints import epoch_folder
from influence.config import Config
from influence.optimizer_state import load_adam_state


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
