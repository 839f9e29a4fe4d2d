"""Which parameters the entries of an optimizer's state are assigned to, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
from adam_states import TRAINED, compare, random_state, saved_state
from tiny_models import ARCHITECTURES, MIXTURES, tiny_model, with_lora
from transformers import Trainer
from transformers.optimization import Adafactor

from influence.errors import InputError
from influence.optimizer_state import load_adam_state


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3", *MIXTURES])
def test_the_order_is_that_of_the_installed_trainer(architecture, tmp_path):
    model = tiny_model(architecture, torch.float32)
    named = list(model.named_parameters())
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    first = [p for name, p in named if name in decayed]
    second = [p for name, p in named if name not in decayed]
    groups = [{"params": first, "weight_decay": 0.1}, {"params": second, "weight_decay": 0.0}]
    file, optimizer = saved_state(model, tmp_path, groups=groups)
    compare(load_adam_state(file, tiny_model(architecture, torch.float32)), named, optimizer)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_oss"])
def test_the_order_of_older_trainers(architecture, tmp_path):
    """They went by a list of types, on which most models' RMS norms were missing: these decay."""
    model = tiny_model(architecture, torch.float32)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
    ]
    file, optimizer = saved_state(model, tmp_path, groups=groups)
    compare(load_adam_state(file, tiny_model(architecture, torch.float32)), named, optimizer)


def _all_but_embeddings(model):
    return [p for name, p in model.named_parameters() if "embed" not in name and "head" not in name]


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        ("llama", lambda model: list(model.parameters())),
        ("llama", _all_but_embeddings),
        ("gpt2", lambda model: list(model.parameters())),
        ("llama lora", lambda model: list(model.parameters())),
    ],
)
def test_other_sets_of_parameters_in_one_group(kind, chosen, tmp_path):
    """`AdamW(model.parameters())`, where an adapter's frozen base has entries without moments."""
    model = TRAINED[kind]()
    named = list(model.named_parameters())
    keep = (lambda name: "lora_" in name) if "lora" in kind else (lambda name: True)
    file, optimizer = saved_state(model, tmp_path, groups=[{"params": chosen(model)}], keep=keep)
    compare(load_adam_state(file, TRAINED[kind]().requires_grad_(False)), named, optimizer)


def test_gradients_required_in_part_say_what_was_trained(tmp_path):
    def partly():
        model = tiny_model("llama", torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1.self_attn" in name or "layers.2" in name)
        return model

    model = partly()
    named = list(model.named_parameters())
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    file, optimizer = saved_state(model, tmp_path, groups=groups)
    compare(load_adam_state(file, partly()), named, optimizer)
    with pytest.raises(InputError, match="does not fit"):
        load_adam_state(file, tiny_model("llama", torch.float32))


def test_names_in_the_state_go_before_any_order(tmp_path):
    """Backwards, so that the order of the model cannot be right; tied weights by either name."""
    model = tiny_model("gpt2", torch.float32)
    named = list(model.named_parameters())
    aliased = [(name.replace("transformer.wte", "lm_head"), p) for name, p in named[::-1]]
    assert any(name == "lm_head.weight" for name, _p in aliased)
    file, optimizer = saved_state(model, tmp_path, groups=[{"params": aliased}])
    compare(load_adam_state(file, tiny_model("gpt2", torch.float32)), named, optimizer)
    compiled = [(f"_orig_mod.{name}", p) for name, p in named[::-1]]
    file, optimizer = saved_state(model, tmp_path, groups=[{"params": compiled}])
    compare(load_adam_state(file, tiny_model("gpt2", torch.float32)), named, optimizer)


def test_names_as_keys_of_the_state(tmp_path):
    """As FSDP's full optimizer state has them."""
    model = tiny_model("llama", torch.float32)
    named = list(model.named_parameters())
    file, optimizer = saved_state(model, tmp_path, groups=[{"params": list(model.parameters())}])
    saved = torch.load(file)
    names = [name for name, _p in named]
    saved["state"] = {names[key]: value for key, value in reversed(saved["state"].items())}
    saved["param_groups"][0]["params"] = names[::-1]
    torch.save(saved, file)
    compare(load_adam_state(file, tiny_model("llama", torch.float32)), named, optimizer)


class _Square(torch.nn.Module):
    """Three matrices of one shape, of which the first embeds."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("embed", "body", "head"):
            self.add_module(name, torch.nn.Linear(4, 4, bias=False))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.get_submodule("embed")


def test_several_readings_are_refused(tmp_path):
    """Two entries: body and head if the embeddings were frozen, embed and body by requires_grad."""
    model = _Square()
    file, optimizer = saved_state(
        model, tmp_path, groups=[{"params": list(model.parameters())[:2]}]
    )
    fresh = _Square()
    frozen = [(name, p) for name, p in model.named_parameters() if name != "embed.weight"]
    assert set(load_adam_state(file, fresh).exp_avg) == {name for name, _p in frozen}
    fresh.get_submodule("head").requires_grad_(False)
    wanted = "several ways.*an entry is of body.weight or of embed.weight; save the state of an opt"
    with pytest.raises(InputError, match=wanted):
        load_adam_state(file, fresh)
    names = [(name, p) for name, p in model.named_parameters() if name != "head.weight"]
    file, optimizer = saved_state(model, tmp_path, groups=[{"params": names}])
    compare(load_adam_state(file, fresh), list(model.named_parameters()), optimizer)


def test_adapter_and_base_model_are_not_mixed_up_by_name(tmp_path):
    base, adapted = tiny_model("llama", torch.float32), TRAINED["llama lora"]()
    file, _optimizer = saved_state(base, tmp_path)
    wanted = "model.embed_tokens.weight is in the state, but not in the model.*leave out"
    with pytest.raises(InputError, match=wanted):
        load_adam_state(file, TRAINED["llama lora"]())
    factors = [(name, p) for name, p in adapted.named_parameters() if "lora_" in name]
    file, _optimizer = saved_state(adapted, tmp_path, groups=[{"params": factors}])
    wanted = "base_model.*lora_A.default.weight is in the state, but not.*set model.adapter"
    with pytest.raises(InputError, match=wanted):
        load_adam_state(file, base)


@pytest.mark.parametrize("named", [True, False])
def test_the_first_shape_that_does_not_fit_is_named(named, tmp_path):
    wider = with_lora(tiny_model("llama", torch.float32), r=4)
    factors = [(name, p) for name, p in wider.named_parameters() if "lora_" in name]
    groups = [{"params": factors if named else [p for _name, p in factors]}]
    file, _optimizer = saved_state(wider, tmp_path, groups=groups)
    name = "layers.0.self_attn.q_proj.lora_A.default.weight"
    wanted = rf"{name}: expected shape \(3, 32\), found \(4, 32\).*load the model, and the adapter"
    with pytest.raises(InputError, match=wanted):
        load_adam_state(file, TRAINED["llama lora"]())


def test_a_parameter_too_many_or_too_few_is_named(tmp_path):
    model = tiny_model("llama", torch.float32)
    file, _optimizer = saved_state(
        model, tmp_path, groups=[{"params": list(model.parameters())[:-1]}]
    )
    wanted = r"groups of \[29\]; lm_head.weight: expected shape \(97, 32\), found nothing"
    with pytest.raises(InputError, match=wanted):
        load_adam_state(file, tiny_model("llama", torch.float32))
    more = [*model.parameters(), torch.nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.AdamW(more)
    for parameter in more:
        optimizer.state[parameter] = random_state(parameter, torch.Generator())
    torch.save(optimizer.state_dict(), file)
    with pytest.raises(InputError, match=r"31 parameters.*entry 30: expected no further parameter"):
        load_adam_state(file, tiny_model("llama", torch.float32))


class _Boom:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_refused_unopened(tmp_path):
    left = str(tmp_path / "executed")
    file = str(tmp_path / "optimizer.pt")
    torch.save({"state": {}, "param_groups": [_Boom(left)]}, file)
    with pytest.raises(InputError, match="never loaded: save the optimizer's state again"):
        load_adam_state(file, tiny_model("llama"))
    assert not os.path.exists(left), "the pickle was executed"


def test_files_that_are_no_optimizer_state(tmp_path):
    model = tiny_model("llama")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(InputError, match=r"optimizer.pt does not exist \(.*: model.safetensors\)"):
        load_adam_state(str(tmp_path), model)
    with pytest.raises(InputError, match=r"absent/optimizer.pt does not exist .*give a checkpoint"):
        load_adam_state(str(tmp_path / "absent" / "optimizer.pt"), model)
    file = tmp_path / "optimizer.pt"
    file.write_text("no state at all")
    with pytest.raises(InputError, match=r"no file of torch.save"):
        load_adam_state(str(file), model)
    saved_state(model, tmp_path)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(InputError, match="cut off"):
        load_adam_state(str(file), model)
    torch.save(model.state_dict(), file)
    with pytest.raises(InputError, match=r"no optimizer's state.*found model.embed_tokens.weight"):
        load_adam_state(str(file), model)


def _stepped_once(make, folder) -> str:
    model = tiny_model("llama", torch.float32)
    optimizer = make(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = os.path.join(folder, "optimizer.pt")
    torch.save(optimizer.state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda p: Adafactor(p, lr=1e-3, relative_step=False), r"exp_avg_sq_row.* \(Adafactor\)"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), r"momentum_buffer \(SGD or Muon\)"),
        (lambda p: torch.optim.NAdam(p), r"mu_product.* \(NAdam\)"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "no moments of any parameter"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight decay inside its gradients"),
        (lambda p: torch.optim.AdamW(p, maximize=True), "Adam with maximize"),
        (
            lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "lr": 0.5}]),
            r"expected one initial_lr .*\[0.001, 0.5\]",
        ),
        (
            lambda p: torch.optim.AdamW([{"params": p[:3]}, {"params": p[3:], "eps": 0.5}]),
            r"expected one eps .*\[1e-08, 0.5\]",
        ),
    ],
)
def test_other_optimizers_are_named(make, wanted, tmp_path):
    file = _stepped_once(make, tmp_path)
    with pytest.raises(InputError, match=rf"optimizer\.state: .*{wanted}"):
        load_adam_state(file, tiny_model("llama", torch.float32))


def test_quantised_states_are_refused(tmp_path):
    model = tiny_model("llama", torch.float32)
    file, _optimizer = saved_state(model, tmp_path)
    saved = torch.load(file)
    moments = saved["state"][3]
    moments["exp_avg"] = moments["exp_avg"].char()
    torch.save(saved, file)
    with pytest.raises(InputError, match=r"parameter 3 .* quantised or distributed"):
        load_adam_state(file, model)
    for key, each in saved["state"].items():
        tables = {"state1": each["exp_avg"].char(), "state2": each["exp_avg_sq"].char()}
        saved["state"][key] = {"step": 1, **tables, "qmap1": torch.zeros(256)}
    torch.save(saved, file)
    with pytest.raises(InputError, match=r"state1, .*bitsandbytes; its quantised states are not"):
        load_adam_state(file, model)
