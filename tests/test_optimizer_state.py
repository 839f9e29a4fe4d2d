"""Adam's moments from real checkpoints by name, and the step's factors against real AdamW steps."""

from __future__ import annotations

import math
import os
import shutil

import pytest
import torch
from adam_states import STEPS, TRAINED, compare, saved_state, train
from gradient_oracle import close, flat, oracle, random_targets, setup
from peft import PeftModel
from tiny_models import random_batch, tiny_model, with_lora
from transformers import AutoModelForCausalLM, Trainer

from influence.errors import InputError
from influence.gradients import make_engine
from influence.optimizer_state import adam_offset, adam_scale, layer_scales, load_adam_state


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By kind: (checkpoint folder, the trainer with its live optimizer), trained on first use."""
    done: dict[str, tuple[str, Trainer]] = {}

    def get(kind: str) -> tuple[str, Trainer]:
        if kind not in done:
            folder = str(tmp_path_factory.mktemp(kind.replace(" ", "_")))
            done[kind] = (
                os.path.join(folder, f"checkpoint-{STEPS}"),
                train(TRAINED[kind](), folder),
            )
        return done[kind]

    return get


def _fresh(kind: str, checkpoint: str):
    """The model as a replica loads it: from the checkpoint, an adapter frozen."""
    if "lora" not in kind:
        return AutoModelForCausalLM.from_pretrained(checkpoint)
    base = tiny_model(kind.split()[0], torch.float32)
    model = PeftModel.from_pretrained(base, checkpoint)
    assert not any("lora_A" in n and p.requires_grad for n, p in model.named_parameters())
    return model


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trainers_checkpoint_is_read_by_name(kind, checkpoints):
    checkpoint, trainer = checkpoints(kind)
    live = trainer.optimizer.optimizer
    groups = [group for group in live.param_groups if group["params"]]
    assert len(groups) == (1 if kind == "llama lora" else 2), "the test no longer covers two groups"
    state = load_adam_state(checkpoint, _fresh(kind, checkpoint))
    compare(state, list(trainer.model.named_parameters()), live)
    assert (state.step, state.beta1, state.beta2, state.eps) == (STEPS, 0.8, 0.95, 1e-6)
    assert state.learning_rate == groups[0]["lr"], "not the rate of the step to come"
    assert 0 < state.learning_rate < 1e-3
    file = os.path.join(checkpoint, "optimizer.pt")
    again = load_adam_state(file, _fresh(kind, checkpoint))
    assert again.weight_decay == state.weight_decay, "the file alone is read differently"


def _bare(checkpoint: str, folder) -> str:
    """optimizer.pt alone, with nothing beside it that tells of an adapter."""
    return shutil.copy(os.path.join(checkpoint, "optimizer.pt"), folder)


@pytest.mark.parametrize("bare", [False, True])
def test_adapter_and_base_model_are_not_mixed_up(bare, checkpoints, tmp_path):
    adapter, full = checkpoints("llama lora")[0], checkpoints("llama")[0]
    path = _bare(adapter, tmp_path) if bare else adapter
    wanted = r"optimizer\.state: .*optimizer.pt does not fit this LlamaForCausalLM: 42 parameters"
    with pytest.raises(InputError, match=wanted + ".*with an adapter.*set model.adapter"):
        load_adam_state(path, tiny_model("llama", torch.float32))
    path = _bare(full, tmp_path) if bare else full
    wanted = r"does not fit this PeftModel.*: 30 parameters in groups of \[23, 7\]"
    with pytest.raises(InputError, match=wanted + ".*full fine-tune.*leave out model.adapter"):
        load_adam_state(path, with_lora(tiny_model("llama", torch.float32)))


def _expected_scale(moments, step: int, beta1: float, beta2: float, eps: float) -> torch.Tensor:
    """a entry by entry in Python numbers."""
    values = [
        (1 - beta1) / (1 - beta1 ** (step + 1)) / (math.sqrt(v / (1 - beta2 ** (step + 1))) + eps)
        for v in moments["exp_avg_sq"].double().flatten().tolist()
    ]
    return torch.tensor(values, dtype=torch.float64).view(moments["exp_avg_sq"].shape)


@pytest.mark.parametrize("named", [True, False])
def test_every_parameter_has_its_own_number_of_steps(named, tmp_path):
    """An expert that no token reached is not stepped; Adam corrects its bias by its own count."""
    model = tiny_model("llama", torch.float64)
    parameters = list(model.named_parameters()) if named else list(model.parameters())
    _file, optimizer = saved_state(model, tmp_path, groups=[{"params": parameters}])
    late, never = model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.down_proj
    optimizer.state[late.weight]["step"] = torch.tensor(2.0)
    del optimizer.state[never.weight]
    file = os.path.join(tmp_path, "optimizer.pt")
    torch.save(optimizer.state_dict(), file)
    fresh, layers = setup("llama", "linear")
    state = load_adam_state(file, fresh)
    compare(state, list(model.named_parameters()), optimizer)
    assert state.step == 4, "the optimizer's own count is the largest"
    own = {layer.name: layer for layer in layers}
    name = "model.layers.1.mlp.up_proj.weight"
    expected = _expected_scale(optimizer.state[late.weight], 2, 0.8, 0.95, 1e-6)
    close(layer_scales(state, [own[name]])[name], expected, "corrected by another parameter's t")
    missing = "1 of 21 .*model.layers.1.mlp.down_proj.weight.*never stepped.*gradients.parameters"
    with pytest.raises(InputError, match=missing):
        layer_scales(state, layers)


@pytest.mark.parametrize("step", [0, 1, 7, 900])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_real_step_moves_by_a_g_plus_b(step, decay):
    """torch moves v by the step's own gradient before dividing, and the formula has v fixed.

    So exp_avg_sq is set to (v - (1 - beta2) g^2) / beta2, which the step turns into v; v is at
    least g^2, so that it is not negative. torch decays as theta * (1 - lr * wd) beforehand, which
    is the step's -lr * wd * theta.
    """
    generator = torch.Generator().manual_seed(step)
    theta, g, m, more = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    v = g.square() + more.square()
    lr, beta1, beta2, eps = 0.01, 0.8, 0.97, 1e-3
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(float(step)),
        "exp_avg": m.clone(),
        "exp_avg_sq": (v - (1 - beta2) * g.square()) / beta2,
    }
    parameter.grad = g.clone()
    optimizer.step()
    settings = {"step": step, "beta1": beta1, "beta2": beta2, "eps": eps}
    a = adam_scale(v, **settings)
    b = adam_offset(m, v, theta, weight_decay=decay, **settings)
    torch.testing.assert_close(
        parameter.detach() - theta,
        -lr * (a * g + b),
        rtol=1e-10,
        atol=1e-14,
        msg="a or b is corrected for another t, or eps or the decay is in another place",
    )


def test_amsgrad_divides_by_the_running_maximum(tmp_path):
    """The maximum is above the new v everywhere, so the real step needs no trick to keep it."""
    model = tiny_model("llama", torch.float64)
    parameters = list(model.named_parameters())
    _file, optimizer = saved_state(model, tmp_path, groups=[{"params": parameters}], amsgrad=True)
    for moments in optimizer.state.values():
        moments["max_exp_avg_sq"] = moments["exp_avg_sq"] + 2.0
    file = os.path.join(tmp_path, "optimizer.pt")
    torch.save(optimizer.state_dict(), file)
    state = load_adam_state(file, tiny_model("llama"))
    before = {name: p.detach().clone() for name, p in parameters}
    generator = torch.Generator().manual_seed(2)
    for _name, parameter in parameters:
        parameter.grad = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    optimizer.step()
    for name, parameter in parameters:
        settings = {"step": 4, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
        a = adam_scale(state.exp_avg_sq[name], **settings)
        b = adam_offset(
            state.exp_avg[name],
            state.exp_avg_sq[name],
            before[name],
            weight_decay=state.weight_decay[name],
            **settings,
        )
        moved = parameter.detach() - before[name]
        close(moved, -1e-3 * (a * parameter.grad + b), f"{name}: divided by v, not its maximum")


def test_half_precision_moments_are_widened():
    v = torch.tensor([1e-8, 3e-3, 0.0], dtype=torch.bfloat16)
    scale = adam_scale(v, step=9, beta1=0.9, beta2=0.999, eps=1e-8)
    expected = _expected_scale({"exp_avg_sq": v}, 9, 0.9, 0.999, 1e-8).float()
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0.0, msg="computed in bfloat16")


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "linear"), ("gpt2", "all"), ("llama", "lora"), ("gpt2", "lora"), ("gpt_oss", "all")],
)
def test_engine_scales_every_samples_gradient(architecture, kind, tmp_path):
    model, layers = setup(architecture, kind)
    file, optimizer = saved_state(model, tmp_path)
    scales = layer_scales(load_adam_state(file, model), layers)
    batch, targets = random_batch(), random_targets(layers, 2)
    _losses, gradients = oracle(model, layers, batch)
    conv1d = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D"
    }
    # gpt-oss stores its experts as (experts, in, out).
    experts = tuple(f"experts.{name}_proj" for name in ("gate_up", "down"))
    scaled, turned = {}, 0
    for layer in layers:
        a = _expected_scale(optimizer.state[layer.parameter], 4, 0.8, 0.95, 1e-6)
        if layer.name in conv1d or layer.name.endswith(experts):
            a, turned = a.transpose(-1, -2), turned + 1
        gradient = gradients[layer.name]
        scaled[layer.name] = gradient * a.reshape(gradient.shape[1:])
    expect_turned = (architecture, kind) in {("gpt2", "all"), ("gpt_oss", "all")}
    assert bool(turned) == expect_turned, "the test no longer covers transposed weights"
    settings = {"reduction": "mean", "scale": scales, "targets": targets}
    found = make_engine(model, layers, full=True, **settings)(batch)
    close(found.vectors, flat(scaled), "a is of another layer, or presented untransposed")
    close(found.norm, flat(scaled).norm(dim=1), "norm of the unscaled gradient")
    close(found.products, flat(scaled) @ flat(targets).T, "products of unscaled gradients")


def test_moments_of_another_model_do_not_reach_the_engine(tmp_path):
    file, _optimizer = saved_state(tiny_model("llama"), tmp_path)
    state = load_adam_state(file, tiny_model("llama"))
    _model, layers = setup("qwen3", "all")
    with pytest.raises(InputError, match=r"q_proj|q_norm"):
        layer_scales(state, layers)
    _model, layers = setup("llama", "lora")
    with pytest.raises(InputError, match=r"lora_A.*patterns of the trained ones"):
        layer_scales(state, layers)
