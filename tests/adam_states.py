"""States of Adam to load, and the check against the live optimizer they were saved from."""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model, with_lora
from transformers import Trainer, TrainingArguments

STEPS = 3


def _extended(architecture: str, bias: str, whole: list[str]):
    """LoRA whose adapter trains biases and whole modules, too: two weight-decay groups."""
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "k_proj"]
    config = LoraConfig(
        r=2,
        target_modules=targets,
        bias=bias,  # type: ignore[arg-type]
        modules_to_save=whole,
        fan_in_fan_out=architecture == "gpt2",
    )
    return get_peft_model(tiny_model(architecture, torch.float32), config)


TRAINED = {
    "llama": lambda: tiny_model("llama", torch.float32),
    "gpt2": lambda: tiny_model("gpt2", torch.float32),
    "llama lora": lambda: with_lora(tiny_model("llama", torch.float32)),
    "gpt2 lora": lambda: _extended("gpt2", "all", ["ln_f"]),
    "qwen2 lora": lambda: _extended("qwen2", "lora_only", ["norm", "input_layernorm"]),
}


def train(model, folder: str) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCAB, (2 * STEPS, 8), generator=generator)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=STEPS,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        learning_rate=1e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 2e-4},
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in rows])
    trainer.train()
    return trainer


def random_state(parameter: torch.Tensor, generator: torch.Generator, step: float = 4.0):
    moments = [
        torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for _ in range(2)
    ]
    return {"step": torch.tensor(step), "exp_avg": moments[0], "exp_avg_sq": moments[1].square()}


def saved_state(model, folder, *, groups=None, keep=lambda name: True, **options):
    """(file, optimizer): random moments for the kept parameters of `groups` of named parameters."""
    every = dict(model.named_parameters())
    groups = groups or [{"params": list(every.items())}]
    options = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, **options}
    optimizer = torch.optim.AdamW(groups, **options)
    generator = torch.Generator().manual_seed(1)
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in every.items():
        if id(parameter) in inside and keep(name):
            optimizer.state[parameter] = random_state(parameter, generator)
    file = os.path.join(folder, "optimizer.pt")
    torch.save(optimizer.state_dict(), file)
    return file, optimizer


def compare(state, named, optimizer) -> None:
    """`state` against the live optimizer's, whose parameters are known by identity."""
    live = {name: optimizer.state[p] for name, p in named if optimizer.state.get(p)}
    assert set(state.exp_avg) == set(state.exp_avg_sq) == set(live), "other parameters have moments"
    assert any(moments["exp_avg"].abs().max() > 0 for moments in live.values())
    for name, moments in live.items():
        message = f"{name} has the moments of another parameter: the order is not the Trainer's"
        assert torch.equal(state.exp_avg[name], moments["exp_avg"]), message
        assert torch.equal(state.exp_avg_sq[name], moments["exp_avg_sq"]), message
        assert state.steps[name] == int(moments["step"]), f"{name}: steps of another parameter"
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {name: decays[id(p)] for name, p in named if name in live}
    assert state.weight_decay == expected, "weight decay of another group"
