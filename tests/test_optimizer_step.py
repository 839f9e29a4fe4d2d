"""a and b of an optimiser's next step, from its saved state, against the steps of torch itself."""

from __future__ import annotations

import os

import pytest
import torch
from adam_states import random_state, saved_state
from gradient_oracle import close, setup
from peft import PeftModel
from tiny_models import tiny_model

from influence.errors import InputError
from influence.optimizer_step import has_scale, load_step

RATE = 0.01


def _gradients(layers, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        shape = layer.parameter.shape
        layer.parameter.requires_grad_(True)
        layer.parameter.grad = torch.randn(shape, generator=generator, dtype=torch.float64)


def _compare(step, layers, optimizer, message: str, rate: float = RATE) -> None:
    """Take the real step, and hold a * g + b against what it moved every parameter by."""
    before = {layer.name: layer.parameter.detach().clone() for layer in layers}
    optimizer.step()
    for layer in layers:
        g = layer.shape.present(layer.parameter.grad)
        expected = g if step.scale is None else step.scale[layer.name] * g
        if step.offset is not None:
            expected = expected + step.offset[layer.name]
        moved = layer.shape.present((before[layer.name] - layer.parameter.detach()) / rate)
        close(moved, expected, f"{layer.name}: {message}", rtol=1e-8)


def _trained(model):
    lora = isinstance(model, PeftModel)
    return [(n, p) for n, p in model.named_parameters() if "lora_" in n or not lora]


KINDS = [("llama", "linear"), ("gpt2", "linear"), ("llama", "lora"), ("gpt2", "lora")]
SGD = [
    {},
    {"weight_decay": 0.2},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.2},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
]


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_moves_by_a_g_plus_b(architecture, kind, options, tmp_path):
    """The last parameter was never stepped: its buffer begins with this very gradient."""
    model, layers = setup(architecture, kind)
    optimizer = torch.optim.SGD([p for _n, p in _trained(model)], lr=RATE, **options)
    _gradients(layers, seed=1)
    layers[-1].parameter.grad = None
    optimizer.step()
    file = str(tmp_path / "optimizer.pt")
    torch.save(optimizer.state_dict(), file)
    _gradients(layers)
    step = load_step("sgd", file, model, layers)
    plain = not options.get("dampening") and not options.get("nesterov")
    assert (step.scale is None) == plain, "a of 1 is given as None, and only that"
    assert (step.offset is None) == (not options), "b of 0 is given as None, and only that"
    assert has_scale("sgd", file) == (not plain), "the file alone says otherwise than the model"
    _compare(step, layers, optimizer, f"not the step of SGD with {options}")


def test_every_group_of_sgd_has_its_own_settings(tmp_path):
    model, layers = setup("llama", "linear")
    own = [layer.parameter for layer in layers]
    groups = [
        {"params": own[:3], "momentum": 0.5, "nesterov": True},
        {"params": own[3:], "weight_decay": 0.1},
    ]
    names = [layer.name for layer in layers]
    groups[0]["param_names"], groups[1]["param_names"] = names[:3], names[3:]
    optimizer = torch.optim.SGD(groups, lr=RATE)
    _gradients(layers, seed=1)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    _gradients(layers)
    step = load_step("sgd", str(tmp_path), model, layers)
    _compare(step, layers, optimizer, "the settings of another group")


@pytest.mark.parametrize(("architecture", "kind"), KINDS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_moves_by_a_g_plus_b(architecture, kind, amsgrad, tmp_path):
    """The live optimiser gets the second moment that its step turns into the frozen one.

    With amsgrad the maximum is above any new one, and stays as it is.
    """
    model, layers = setup(architecture, kind)
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(
        _trained(model), lr=RATE, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, amsgrad=amsgrad
    )
    _gradients(layers)
    for number, (_name, parameter) in enumerate(_trained(model)):
        state = random_state(parameter, generator, step=float(3 + number % 4))
        if parameter.grad is not None:
            state["exp_avg_sq"] += parameter.grad.square()
        if amsgrad:
            state["max_exp_avg_sq"] = state["exp_avg_sq"] * 2 + 5
        optimizer.state[parameter] = state
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    step = load_step("adamw", str(tmp_path), model, layers)
    for layer in [] if amsgrad else layers:
        v, g = optimizer.state[layer.parameter]["exp_avg_sq"], layer.parameter.grad
        assert g is not None
        optimizer.state[layer.parameter]["exp_avg_sq"] = (v - 0.05 * g.square()) / 0.95
    assert has_scale("adamw", str(tmp_path))
    _compare(step, layers, optimizer, "a or b is of another step, group, layout or maximum")


def test_b_is_made_only_where_it_is_asked_for(tmp_path):
    model, layers = setup("llama", "linear")
    file, _optimizer = saved_state(model, tmp_path)
    both, alone = (load_step("adamw", file, model, layers, with_offset=w) for w in (True, False))
    assert alone.offset is None, "b is as large as the parameters: the first order goes without"
    for layer in layers:
        assert alone.scale is not None
        assert both.scale is not None
        close(alone.scale[layer.name], both.scale[layer.name], "a depends on whether b is made")


def test_the_note_counts_what_is_preconditioned(tmp_path):
    model, layers = setup("llama", "linear")
    file, optimizer = saved_state(model, tmp_path)
    optimizer.state[layers[0].parameter]["exp_avg_sq"][0] = 0.0
    torch.save(optimizer.state_dict(), file)
    step = load_step("adamw", file, model, layers)
    others = dict(model.named_parameters()).keys() - {layer.name for layer in layers}
    numbers = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for name, p in model.named_parameters() if name in others)
    assert f"moments of {len(layers)} of {len(layers)} attributed" in step.note
    assert f"{len(others)} others have moments" in step.note
    assert f"({left / numbers:.1%} of both)" in step.note, "the share is of something else"
    assert f"{layers[0].in_features:,} of their" in step.note, "v = 0 goes unsaid"


def test_an_optimiser_without_its_state_is_refused(tmp_path):
    model, layers = setup("llama", "linear")
    plain = load_step("sgd", None, model, layers)
    assert plain.scale is None
    assert plain.offset is None
    assert not has_scale("sgd", None)
    for ask in (lambda: load_step("adamw", None, model, layers), lambda: has_scale("adamw", None)):
        with pytest.raises(InputError, match=r"optimizer\.state: null.*warm-up"):
            ask()
    with pytest.raises(InputError, match=r"optimizer\.kind: 'lion'.*sgd, adamw"):
        load_step("lion", None, model, layers)
    file, _optimizer = saved_state(model, tmp_path)
    with pytest.raises(InputError, match=r"state of torch\.optim\.SGD.*dampening.*adamw"):
        load_step("sgd", file, model, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, maximize=True)
    torch.save(optimizer.state_dict(), file)
    with pytest.raises(InputError, match="maximize"):
        load_step("sgd", file, model, layers)


def test_sgd_of_another_model_is_refused(tmp_path):
    model, layers = setup("llama", "lora")
    other = tiny_model("llama", torch.float64)
    optimizer = torch.optim.SGD(other.parameters(), lr=RATE, momentum=0.9)
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), os.path.join(tmp_path, "optimizer.pt"))
    with pytest.raises(InputError, match="does not fit this PeftModel"):
        load_step("sgd", str(tmp_path), model, layers)
    model, layers = setup("qwen3", "all")
    with pytest.raises(InputError, match="does not fit this Qwen3"):
        load_step("sgd", str(tmp_path), model, layers)
