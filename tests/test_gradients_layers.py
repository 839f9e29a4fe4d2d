"""Which layers are attributed, and that nothing is left out silently."""

from __future__ import annotations

import pytest
import torch
from gradient_oracle import close, flat, oracle
from tiny_models import ARCHITECTURES, MIXTURES, random_batch, tiny_model, with_lora
from torch import nn

from influence.errors import InputError
from influence.gradients import attributed_layers, coverage, make_engine


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3", *MIXTURES])
@pytest.mark.parametrize("kind", ["all", "linear", "lora"])
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
        if kind == "all"
        or (kind == "lora" and "lora_" in name)
        or (kind == "linear" and parameter.ndim >= 2 and _in_blocks(name) and "bias" not in name)
    )
    assert sum(row.parameters for row in rows if row.attributed) == expected
    assert all(row.attributed == (row.reason is None) for row in rows), "left out without a reason"
    left_out = " ".join(row.group for row in rows if not row.attributed)
    if kind == "all":
        assert not left_out, "a parameter of the model has no rule"
    else:
        assert "embeddings" in left_out, "the embeddings must be named as not attributed"
        assert "output head" in left_out, "the output head must be named as not attributed"


def _in_blocks(name: str) -> bool:
    return ".layers." in name or ".h." in name


def test_order_orientation_and_names():
    layers = attributed_layers(tiny_model("gpt2"), "linear")
    first = [(x.name, x.out_features, x.in_features) for x in layers[:4]]
    assert first == [
        ("transformer.h.0.attn.c_attn.weight", 96, 32),
        ("transformer.h.0.attn.c_proj.weight", 32, 32),
        ("transformer.h.0.mlp.c_fc.weight", 128, 32),
        ("transformer.h.0.mlp.c_proj.weight", 32, 128),
    ], "Conv1D stores (in, out), its gradient is presented as (out, in)"
    layers = attributed_layers(tiny_model("gpt_oss"), "linear")
    experts = {x.name.rpartition(".")[2]: x for x in layers if "experts" in x.name}
    up = experts["gate_up_proj"]
    assert (up.parts, up.out_features, up.in_features) == (4, 4 * 96, 32), "stored as (e, in, out)"


def test_presented_weight_multiplies_from_the_left():
    for layer in attributed_layers(tiny_model("gpt2"), "linear"):
        x = torch.randn(2, layer.in_features, dtype=torch.float64)
        weight = layer.shape.present(layer.parameter)
        bias = layer.uses[0].module.bias
        torch.testing.assert_close(
            layer.uses[0].module(x), x @ weight.T + bias, rtol=1e-12, atol=1e-12, msg=layer.name
        )


def test_layers_not_chosen_are_named():
    model = tiny_model("llama")
    layers = attributed_layers(model, "all")
    rows = coverage(model, layers[:5])
    rest = sum(layer.size for layer in layers[5:])
    reason = "not among the chosen parameters"
    assert sum(row.parameters for row in rows if row.reason == reason) == rest


def test_only_the_active_adapter_counts():
    from peft import LoraConfig

    model = with_lora(tiny_model("llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    names = [layer.name for layer in attributed_layers(model, "lora")]
    assert names, "the active adapter's factors must be found"
    assert all(".default." in name for name in names), "an inactive adapter's factors"


def test_merged_adapter_and_no_adapter_say_what_to_do():
    model = with_lora(tiny_model("llama"))
    model.merge_adapter()
    with pytest.raises(InputError, match="merged"):
        attributed_layers(model, "lora")
    with pytest.raises(InputError, match=r"model\.adapter"):
        attributed_layers(tiny_model("llama"), "lora")


def test_a_weight_shared_by_two_modules_is_one_layer():
    model = tiny_model("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    layers = attributed_layers(model, "all")
    (shared,) = [layer for layer in layers if layer.name == "model.layers.0.mlp.up_proj.weight"]
    assert [use.module for use in shared.uses] == [first.up_proj, second.up_proj]
    batch = random_batch()
    _losses, gradients = oracle(model, layers, batch)
    norm = make_engine(model, layers, reduction="mean")(batch).norm
    close(norm, flat(gradients).norm(dim=1), "the two uses must be added before they are squared")


@pytest.mark.parametrize("kind", ["all", "linear"])
def test_the_last_blocks_stop_the_backward_pass_early(kind):
    model = tiny_model("llama")
    layers = attributed_layers(model, kind, blocks="last 1")
    assert {layer.name.split(".")[2] for layer in layers} == {"2"}
    reached = []
    handle = model.model.layers[1].register_full_backward_hook(lambda *_: reached.append(1))
    batch = random_batch()
    norm = make_engine(model, layers, reduction="mean")(batch).norm
    handle.remove()
    assert not reached, "the backward pass went on below the first attributed block"
    _losses, gradients = oracle(model, layers, batch)
    close(norm, flat(gradients).norm(dim=1), "gradients of the last block")


def test_random_blocks_depend_on_the_seed_alone():
    model = tiny_model("llama")

    def drawn(seed):
        layers = attributed_layers(model, "linear", blocks="random 2", seed=seed)
        return frozenset(layer.name.split(".")[2] for layer in layers)

    draws = [drawn(seed) for seed in range(12)]
    assert all(len(blocks) == 2 for blocks in draws)
    assert draws == [drawn(seed) for seed in range(12)], "not reproducible"
    assert len(set(draws)) == 3, "some pairs of blocks are never drawn"


def test_patterns_choose_by_full_name():
    model = tiny_model("llama")
    names = [x.name for x in attributed_layers(model, ["*.q_proj.weight", "lm_head*"])]
    assert names == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)] + [
        "lm_head.weight"
    ]
    with pytest.raises(InputError, match=r"'\*\.qproj\.\*' matches no parameter.*embed_tokens"):
        attributed_layers(model, "*.qproj.*")
    for bad in ("last 0", "last 4", "first 2", "random"):
        with pytest.raises(InputError, match=r"gradients\.blocks.*1 to 3"):
            attributed_layers(model, "linear", blocks=bad)
    with pytest.raises(InputError, match="nothing to attribute"):
        attributed_layers(model, "lm_head.weight", blocks="last 1")


def test_quantised_weights_are_named_and_left_out():
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    stored = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = stored
    rows = coverage(model, attributed_layers(model, "linear"))
    left = [row for row in rows if row.reason and "quantised" in row.reason]
    assert [row.parameters for row in left] == [weight.numel()]
