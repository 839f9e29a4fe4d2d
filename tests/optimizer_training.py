"""A short training about whose optimizer's next step runs are, and that step's a by torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Setup


@dataclass(frozen=True)
class Trained:
    """A training's checkpoint, and the model in float64 as it was when it was saved.

    scale, offset: a and b of the optimiser's next step by parameter, as torch itself moves it.
    changes: what the model's runs have in their configs.
    """

    setup: Setup
    checkpoint: str
    model: Any
    scale: dict[str, torch.Tensor]
    changes: dict[str, Any]
    offset: dict[str, torch.Tensor] = field(default_factory=dict)


def torch_offset(
    state: dict[str, Any], group: dict[str, Any], parameter: torch.Tensor
) -> torch.Tensor:
    """b: how far AdamW steps with a gradient of 0 (at a rate of 1), v being the same."""
    moved = torch.nn.Parameter(parameter.detach().double().clone())
    options = {"betas": group["betas"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
    # At a rate of 1 the decay would come first: the parts of a small step are taken apart.
    optimizer = torch.optim.AdamW([moved], lr=1e-6, **options)
    optimizer.state[moved] = {
        "step": state["step"].clone(),
        "exp_avg": state["exp_avg"].double(),
        "exp_avg_sq": state["exp_avg_sq"].double() / group["betas"][1],
    }
    moved.grad = torch.zeros_like(moved)
    optimizer.step()
    return (parameter.detach().double() - moved.detach()) / 1e-6


def torch_scale(state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
    """a: how much farther AdamW steps with a gradient of 1 than with one of 0, v being the same.

    torch moves v by the step's own gradient before it divides: v is set to what this turns into v.
    """
    moved = []
    for gradient in (0.0, 1.0):
        parameter = torch.nn.Parameter(torch.zeros_like(state["exp_avg"], dtype=torch.float64))
        optimizer = torch.optim.AdamW(
            [parameter], lr=1.0, betas=group["betas"], eps=group["eps"], weight_decay=0.0
        )
        beta2, second = group["betas"][1], state["exp_avg_sq"].double()
        optimizer.state[parameter] = {
            "step": state["step"].clone(),
            "exp_avg": state["exp_avg"].double(),
            "exp_avg_sq": (second - (1 - beta2) * gradient**2) / beta2,
        }
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        moved.append(-parameter.detach())
    return moved[1] - moved[0]


def _offsets(trainer: Any) -> dict[str, torch.Tensor]:
    live = trainer.optimizer.optimizer
    groups = {id(p): group for group in live.param_groups for p in group["params"]}
    return {
        name: torch_offset(live.state[p], groups[id(p)], p)
        for name, p in trainer.model.named_parameters()
        if p in live.state
    }


def _scales(trainer: Any) -> dict[str, torch.Tensor]:
    live = trainer.optimizer.optimizer
    groups = {id(p): group for group in live.param_groups for p in group["params"]}
    return {
        name: torch_scale(live.state[p], groups[id(p)])
        for name, p in trainer.model.named_parameters()
        if p in live.state
    }


@pytest.fixture(scope="session")
def lora(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """LoRA factors after a few steps of the Trainer's AdamW."""
    from adam_states import STEPS, train
    from peft import PeftModel
    from tiny_models import with_lora
    from transformers import AutoModelForCausalLM

    folder = str(tmp_path_factory.mktemp("lora"))
    base = AutoModelForCausalLM.from_pretrained(setup.model)
    trainer = train(with_lora(base), folder)
    checkpoint = f"{folder}/checkpoint-{STEPS}"
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float64)
    adapted: Any = PeftModel.from_pretrained(model, checkpoint).double().eval()
    changes = {"model__adapter": checkpoint, "gradients__parameters": "lora"}
    return Trained(setup, checkpoint, adapted, _scales(trainer), changes, _offsets(trainer))


def train_whole(setup: Setup, folder: str) -> Trained:
    """The whole model after a few steps; its matrices in the blocks are attributed."""
    from adam_states import STEPS, train
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = train(AutoModelForCausalLM.from_pretrained(setup.model), folder)
    checkpoint = f"{folder}/checkpoint-{STEPS}"
    AutoTokenizer.from_pretrained(setup.model).save_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    own = replace(setup, model=Path(checkpoint))
    return Trained(own, checkpoint, model, _scales(trainer), {})


def changes_of(trained: Trained, kind: str = "adamw", **changes: Any) -> dict[str, Any]:
    """The changes to a tiny config for runs about a step of this optimiser."""
    state = {"optimizer__state": trained.checkpoint} if kind == "adamw" else {}
    return {**trained.changes, "optimizer__kind": kind, **state, **changes}
