"""Rules are tried against autograd: what they suppose in vain is found and run sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import close, flat, oracle
from tiny_models import ARCHITECTURES, MIXTURES, random_batch, tiny_model, with_lora
from torch import nn

from influence.errors import InputError
from influence.gradients import attributed_layers, block_layout, make_engine, settled_layers
from influence.gradients.settle import _by_autograd, _by_rules, _trial

ODD = ("mamba", "bamba", "qwen3_next", "lfm2", "llama4", "jetmoe", "falcon", "ctrl")


def check(model, layers, batch, rtol=1e-9) -> None:
    """Every layer's gradients, and the norms, against the oracle."""
    _losses, gradients = oracle(model, layers, batch)
    result = make_engine(model, layers, reduction="mean", full=True)(batch)
    whole = float(flat(gradients).abs().max())
    for block in block_layout(layers):
        expected = gradients[block.name]
        end = block.offset + expected[0].numel()
        found = result.vectors[:, block.offset : end].view_as(expected)
        # The bias of a key moves no attention weight: rounding is all there is of its gradient.
        if max(expected.abs().max(), found.abs().max()) < 1e-10 * whole:
            continue
        close(found, expected, f"{block.name}: its rule is wrong", rtol=rtol)
    close(result.norm, flat(gradients).double().norm(dim=1), "norms", rtol=rtol)


@pytest.mark.parametrize("kind", ["all", "linear"])
@pytest.mark.parametrize("architecture", ODD)
def test_odd_architectures(architecture, kind):
    model = tiny_model(architecture)
    layers, _notes = settled_layers(model, attributed_layers(model, kind))
    # Some of these compute in float32 in places, whatever the model's precision is.
    for lengths in ((9, 5, 12, 7), (4, 4, 3, 4), (8,)):
        check(model, layers, random_batch(lengths), rtol=1e-5)


def test_what_is_changed_is_said():
    model = tiny_model("mamba")
    chosen = attributed_layers(model, "linear")
    layers, notes = settled_layers(model, chosen)
    assert [x.name for x in layers] == [x.name for x in chosen], "layers were lost or reordered"
    assert len(notes) == 1
    assert "conv" in notes[0]
    assert "backbone.layers.*.mixer sample by sample" in notes[0]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3", *MIXTURES])
@pytest.mark.parametrize("kind", ["all", "lora"])
def test_rules_of_common_architectures_stand(architecture, kind):
    model = tiny_model(architecture)
    if kind == "lora":
        model = with_lora(model)
    chosen = attributed_layers(model, kind)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    layers, notes = settled_layers(model, chosen)
    assert layers == chosen, f"changed without need: {notes}"
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["deepseek_v3", "mixtral", "gpt_oss", "llama", "gemma"])
def test_lower_precisions_settle(architecture, dtype):
    model = tiny_model(architecture, dtype)
    if architecture in (*MIXTURES, "deepseek_v3"):
        model.set_experts_implementation("grouped_mm")
    layers, notes = settled_layers(model, attributed_layers(model, "all"))
    assert not notes, "rounding was taken for a wrong rule"
    batch = random_batch()
    found = make_engine(model, layers, reduction="mean", full=True)(batch).vectors
    assert torch.isfinite(found).all()
    if dtype == torch.float32:
        check(model, layers, batch, rtol=2e-4)


def test_a_parameter_that_is_called_and_read_is_found():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32).double()

        def forward(self, x):
            return self.inner(x) + F.linear(x, self.inner.weight.tanh())

    model = tiny_model("llama")
    model.model.layers[1].mlp = Twice()
    chosen = attributed_layers(model, "all")
    layers, notes = settled_layers(model, chosen)
    assert any("mlp.inner.weight" in note for note in notes), "half of the gradient was lost"
    check(model, layers, random_batch())


def test_experts_in_a_list_are_run_by_sample():
    """Each sees tokens of many samples; as many as the batch has, perhaps, in another order."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 3, bias=False).double()
            self.experts = nn.ModuleList(nn.Linear(32, 32).double() for _ in range(3))

        def forward(self, x):
            tokens = x.reshape(-1, x.shape[-1])
            weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
            total = torch.zeros_like(tokens)
            for number, expert in enumerate(self.experts):
                slot, token = torch.where((chosen == number).T)
                each = expert(tokens[token]) * weights[token, slot, None]
                total = total.index_add(0, token, each)
            return total.view_as(x)

    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = Experts()
    layers, _notes = settled_layers(model, attributed_layers(model, "all"))
    for lengths in ((9, 5, 12, 7), (4, 4, 3, 4)):
        check(model, layers, random_batch(lengths))


def test_trainable_tokens_do_not_hide_the_embedding():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]}
    )
    model = get_peft_model(tiny_model("llama"), config).double().eval()
    layers, _notes = settled_layers(model, attributed_layers(model, "all"))
    check(model, layers, random_batch())


def test_prompt_learning_is_refused_by_name():
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(tiny_model("llama"), config)
    with pytest.raises(InputError, match=r"model\.adapter.*PROMPT_TUNING"):
        attributed_layers(model, "all")


def test_samples_that_are_mixed_are_refused():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(32).double())

        def forward(self, x):
            return x * self.scale + x.mean(dim=0, keepdim=True)

    model = tiny_model("llama")
    model.model.layers[1].mlp = Mixing()
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.scale.*do not agree"):
        settled_layers(model, attributed_layers(model, ["*.mlp.scale"]))


def test_the_two_sides_of_the_trial_are_independent():
    """A wrong term must show: the probes of one side do not come from the other's numbers."""
    model = tiny_model("llama")
    layers = attributed_layers(model, "all")
    trial = _trial(model, (7, 6, 4))
    found = _by_rules(model, layers, trial)
    expected, norms = _by_autograd(model, layers, trial)
    for layer in layers:
        close(found[layer.name], expected[layer.name], layer.name)
        ratio = expected[layer.name].abs().max() / norms[layer.name]
        assert 0.05 < ratio < 20, "the probes do not see the gradient"
