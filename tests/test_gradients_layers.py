"""Which layers are attributed, and that nothing is left out silently."""

from __future__ import annotations

import pytest
from tiny_models import ARCHITECTURES, tiny_model, with_lora
from torch import nn

from influence.errors import InputError
from influence.gradients import attributed_layers, coverage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["all", "lora"])
def test_coverage_counts_every_parameter_once(architecture, kind):
    model = tiny_model(architecture)
    if kind == "lora":
        model = with_lora(model)
    rows = coverage(model, attributed_layers(model, kind))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(row.parameters for row in rows) == total, "a parameter was left out or counted twice"
    assert sum(row.share for row in rows) == pytest.approx(1.0, rel=1e-12)
    expected = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ("lora_" in name if kind == "lora" else parameter.ndim == 2 and _in_blocks(name))
    )
    assert sum(row.parameters for row in rows if row.attributed) == expected
    assert all(row.attributed == (row.reason is None) for row in rows), "left out without a reason"
    left_out = " ".join(row.group for row in rows if not row.attributed)
    assert "embeddings" in left_out, "the embeddings must be named as not attributed"
    assert "output head" in left_out, "the output head must be named as not attributed"


def _in_blocks(name: str) -> bool:
    return ".layers." in name or ".h." in name


def test_order_orientation_and_names():
    layers = attributed_layers(tiny_model("gpt2"), "all")
    first = [(x.name, x.out_features, x.in_features) for x in layers[:4]]
    assert first == [
        ("transformer.h.0.attn.c_attn", 96, 32),
        ("transformer.h.0.attn.c_proj", 32, 32),
        ("transformer.h.0.mlp.c_fc", 128, 32),
        ("transformer.h.0.mlp.c_proj", 32, 128),
    ], "Conv1D stores (in, out), its gradient is presented as (out, in)"


def test_presented_weight_multiplies_from_the_left():
    for layer in attributed_layers(tiny_model("gpt2"), "all"):
        weight = layer.rule.present(layer.rule.weight(layer.module))
        assert tuple(weight.shape) == (layer.out_features, layer.in_features)


def test_layers_not_chosen_are_named():
    model = tiny_model("llama")
    layers = attributed_layers(model, "all")
    rows = coverage(model, layers[:5])
    rest = sum(layer.size for layer in layers[5:])
    assert [row.parameters for row in rows if row.reason == "not among the chosen layers"] == [rest]


def test_only_the_active_adapter_counts():
    from peft import LoraConfig

    model = with_lora(tiny_model("llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    names = [layer.name for layer in attributed_layers(model, "lora")]
    assert names, "the active adapter's factors must be found"
    assert all(name.endswith(".default") for name in names), "an inactive adapter's factors"


def test_merged_adapter_and_no_adapter_say_what_to_do():
    model = with_lora(tiny_model("llama"))
    model.merge_adapter()
    with pytest.raises(InputError, match="merged"):
        attributed_layers(model, "lora")
    with pytest.raises(InputError, match=r"model\.adapter"):
        attributed_layers(tiny_model("llama"), "lora")


def test_weight_shared_by_two_modules_is_refused():
    model = tiny_model("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*layers\.0\.mlp\.up_proj"):
        attributed_layers(model, "all")


def test_layer_type_without_a_rule_is_named_in_the_coverage():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = Scaled(32, 48, bias=False).double()
    rows = coverage(model, attributed_layers(model, "all"))
    assert [row.parameters for row in rows if "Scaled" in row.group] == [32 * 48], (
        "a subclass may compute something else, so it must not go under nn.Linear's rule"
    )
