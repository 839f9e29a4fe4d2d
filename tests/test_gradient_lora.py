"""The rule for a whole LoRA layer: against batch-of-one autograd through peft's own forward."""

from __future__ import annotations

import weakref

import pytest
import torch
from gradient_oracle import flat, oracle
from test_gradient_rules import check, randomised
from tiny_models import random_batch, rows_of, tiny_model, with_lora
from torch import nn

from influence.gradients import attributed_layers, make_engine
from influence.gradients.settle import settled_layers


def adapted(target_modules, architecture: str = "llama", **options):
    """A tiny model in float64 with random factors at some modules."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=target_modules,
        fan_in_fan_out=architecture == "gpt2",
        lora_dropout=0.1,
        **options,
    )
    return randomised(get_peft_model(tiny_model(architecture), config))


def rules_of(layers) -> set[str]:
    return {layer.rule for layer in layers}


@pytest.mark.parametrize(
    ("architecture", "names"),
    [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"]), ("llama", ["lm_head", "v_proj"])],
)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2]])
def test_factors_match_autograd(architecture, names, rows):
    """The base layer fused, a Conv1D that is called, the head that sees response rows alone."""
    model = adapted(names, architecture)
    layers = attributed_layers(model, "lora")
    assert rules_of(layers) == {"lora"}
    check(model, layers, rows_of(random_batch(), rows))


@pytest.mark.parametrize("pattern", ["*.lora_A.*", "*.lora_B.*", "*layers.2*q_proj.lora_*"])
def test_one_factor_alone_and_a_graph_that_begins_late(pattern):
    model = adapted(["q_proj", "up_proj"])
    layers = attributed_layers(model, [pattern])
    assert rules_of(layers) == {"lora"}
    check(model, layers, random_batch())


def test_the_base_layers_gradients_beside_the_factors():
    model = adapted(["q_proj", "down_proj"])
    layers = attributed_layers(model, ["*q_proj.*", "*down_proj.*"])
    assert rules_of(layers) == {"lora", "linear"}
    check(model, layers, random_batch())


def test_a_base_in_half_precision_under_factors_in_float32():
    model = with_lora(tiny_model("llama", torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    layers = attributed_layers(model, "lora")
    assert rules_of(layers) == {"lora"}
    _losses, gradients = oracle(model, layers, random_batch())
    found = make_engine(model, layers, reduction="mean", full=True)(random_batch()).vectors
    expected = flat(gradients)
    cosine = torch.cosine_similarity(found.double(), expected.double(), dim=1)
    assert cosine.min() > 0.99, f"not in the precision of peft's forward: cosines {cosine}"


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"bias": "lora_only", "lora_bias": True}], ids=str
)
def test_what_is_more_than_plain_lora_keeps_its_rules(options):
    model = adapted(["q_proj", "down_proj"], **({"bias": "none"} | options))
    layers = attributed_layers(model, "lora")
    assert "lora" not in rules_of(layers)
    check(model, layers, random_batch())


def test_two_active_adapters_keep_their_rules():
    from peft import LoraConfig

    model = adapted(["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    layers = attributed_layers(randomised(model), "lora")
    assert rules_of(layers) == {"linear"}
    check(model, layers, random_batch())


def test_a_factor_that_is_used_elsewhere_takes_the_other_one_with_it():
    """By autograd both: beside the rule's own forward no other rule sees the module's factors."""

    class Reader(nn.Module):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def factor(self):
            return self.inner.down_proj.lora_A["default"].weight

        def forward(self, x):
            return self.inner(x) + x.mean(-1, keepdim=True) * self.factor().sum()

    model = adapted(["down_proj"])
    block = model.base_model.model.model.layers[1]
    block.mlp = Reader(block.mlp)
    layers, notes = settled_layers(model, attributed_layers(model, "lora"))
    assert all(factor in " ".join(notes) for factor in ("lora_A", "lora_B")), notes
    check(model, layers, random_batch())


def test_inputs_are_freed_during_the_backward_pass():
    model = adapted(["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    refs: list[weakref.ref] = []
    held: list[int] = []

    def count(_module, _args, output) -> None:
        output.register_hook(lambda _g: held.append(sum(ref() is not None for ref in refs)))

    for block in model.base_model.model.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _m, args: refs.append(weakref.ref(args[0].untyped_storage()))
        )
        block.mlp.down_proj.register_forward_hook(count)
    make_engine(model, attributed_layers(model, "lora"), reduction="mean", full=True)(
        random_batch()
    )
    assert held == sorted(held, reverse=True), "a finished layer's input is still held"
    assert held[-1] < held[0], f"inputs held while the blocks are passed: {held}"
