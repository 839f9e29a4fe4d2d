"""Layer types beyond linear ones: each against batch-of-one autograd."""

from __future__ import annotations

import pytest
import torch
from gradient_oracle import close, flat, oracle
from tiny_models import random_batch, rows_of, tiny_model
from torch import nn

from influence.errors import InputError
from influence.gradients import attributed_layers, block_layout, make_engine
from influence.gradients.experts import _Routes
from influence.gradients.norm import is_norm
from influence.gradients.rule import Rows
from influence.gradients.rules import rule_of


def check(model, layers, batch) -> None:
    """Every layer's gradients, and the norms, against the oracle."""
    _losses, gradients = oracle(model, layers, batch)
    result = make_engine(model, layers, reduction="mean", full=True)(batch)
    for block in block_layout(layers):
        expected = gradients[block.name]
        assert expected.abs().max() > 0, f"{block.name} has no gradient: nothing is tested"
        end = block.offset + expected[0].numel()
        found = result.vectors[:, block.offset : end].view_as(expected)
        close(found, expected, f"{block.name}: its rule is wrong")
    for form in ("pair", "formed", "auto"):
        norm = make_engine(model, layers, reduction="mean", form=form)(batch).norm
        close(norm, flat(gradients).norm(dim=1), f"{form}: terms of one parameter do not add up")


def randomised(model, seed: int = 3):
    """Adapter parameters at random values in float64, so that all of them have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * values + (1.0 if "magnitude" in name else 0.0))
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
def test_dora(architecture):
    from peft import LoraConfig, get_peft_model

    names = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "down_proj"], "phi": ["q_proj", "fc1"]}
    config = LoraConfig(
        r=2,
        use_dora=True,
        target_modules=names[architecture],
        fan_in_fan_out=architecture == "gpt2",
        lora_dropout=0.1,
    )
    model = randomised(get_peft_model(tiny_model(architecture), config))
    layers = attributed_layers(model, "lora")
    assert {"dora magnitude", "linear"} == {layer.rule for layer in layers}
    check(model, layers, random_batch())


def test_lora_on_embeddings_and_on_fused_experts():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    model = randomised(get_peft_model(tiny_model("llama"), config))
    check(model, attributed_layers(model, "lora"), random_batch())
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    model = randomised(get_peft_model(tiny_model("mixtral"), config))
    layers = attributed_layers(model, "lora")
    assert any("experts" in layer.name for layer in layers), "the experts' factors are left out"
    check(model, layers, random_batch())


class Gate(nn.Module):
    """A layer that no rule knows: two parameters, and tokens of a sample that meet each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = torch.randn(width + 1, width, generator=generator, dtype=torch.float64)
        self.mix = nn.Parameter(draw[:width] / width**0.5)
        self.shift = nn.Parameter(draw[width])
        self.inner = nn.Linear(width, width).double()

    def forward(self, x):
        # The running mean over the sample's earlier tokens: causal, but not token by token.
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return x + self.inner(torch.tanh(x.cumsum(1) / count @ self.mix + self.shift))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2]])
def test_layers_without_a_rule_fall_back_to_autograd_by_sample(rows):
    model = tiny_model("llama")
    for block in model.model.layers[:2]:
        block.mlp = nn.Sequential(block.mlp, Gate(32))
    layers = attributed_layers(model, "all")
    rules = {layer.name.rpartition(".")[2]: layer.rule for layer in layers}
    assert rules["mix"] == rules["shift"] == "autograd by sample"
    check(model, layers, rows_of(random_batch(), rows))


def test_a_subclass_that_computes_something_else_is_not_taken_for_its_base():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = Scaled(32, 48, bias=False).double()
    layers = attributed_layers(model, "linear")
    odd = [layer for layer in layers if layer.name == "model.layers.1.mlp.up_proj.weight"]
    assert [layer.rule for layer in odd] == ["autograd by sample"]
    check(model, layers, random_batch())


def test_norms_are_known_by_what_they_do():
    class OddNorm(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 0.7))
            self.power = power

        def forward(self, x):
            return x / x.norm(dim=-1, keepdim=True) * (0.3 - self.weight**self.power)

    assert is_norm(OddNorm(1)), "affine in its weight"
    assert not is_norm(OddNorm(2)), "not affine in its weight: s(x) would be wrong"
    assert rule_of(OddNorm(2)).name == "autograd by sample"


def test_a_router_whose_scores_bypass_its_logits_is_not_linear():
    class Router(nn.Module):
        def __init__(self, apart: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))
            self.apart = apart

        def forward(self, x):
            logits = x @ self.weight.T
            source = x @ self.weight.T if self.apart else logits
            return logits, source.softmax(-1)

    assert rule_of(Router(False)).name == "linear"
    assert rule_of(Router(True)).name == "autograd by sample", "a gradient would be lost"


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    """As in torch, also where the padding token is part of the text."""
    model = tiny_model("llama")
    batch = random_batch()
    batch.input_ids[0, 2:4] = model.config.pad_token_id
    layers = [x for x in attributed_layers(model, "all") if "embed" in x.name]
    check(model, layers, batch)


def test_experts_called_twice_in_one_forward_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    layers = attributed_layers(model, "all")
    with pytest.raises(InputError, match=r"experts.*several times"):
        make_engine(model, layers, reduction="mean")(random_batch())


def test_popular_experts_do_not_pad_the_others():
    """Every row lies in one grid, at its sample and expert, and padding at most doubles them."""
    generator = torch.Generator().manual_seed(0)
    popularity = 1.0 / torch.arange(1, 33).double() ** 1.5
    chosen = torch.multinomial(popularity.expand(4 * 50, -1), 3, generator=generator)
    rows = Rows(4, 50, torch.arange(4), None)
    routes = _Routes(chosen, 32, rows)
    pairs = torch.arange(600, dtype=torch.float64).unsqueeze(1) + 1
    found, cells = {}, 0
    for bucket in routes.buckets:
        grid = bucket.grid(pairs)
        cells += grid.numel()
        for place, (sample, part) in enumerate(zip(bucket.sample, bucket.part, strict=True)):
            inside = grid[place].flatten()
            found[int(sample), int(part)] = sorted(inside[inside > 0].tolist())
    expected: dict[tuple[int, int], list[float]] = {}
    flat = chosen.flatten()
    for position, pair in enumerate(routes.order.tolist()):
        key = (pair // 3 // 50, int(flat[pair]))
        expected.setdefault(key, []).append(position + 1.0)
    assert found == expected, "a token was lost, or is another sample's or expert's"
    assert cells <= 2 * 600, f"{cells} cells for 600 rows"


def test_rows_that_no_sample_owns_are_refused():
    class Flat(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return (
                self.inner(x.flatten(0, 1)[1:]).new_zeros(x.shape)
                + x * self.inner(x.flatten(0, 1)[1:]).mean()
            )

    model = tiny_model("llama")
    model.model.layers[0].mlp = Flat(nn.Linear(32, 32).double())
    layers = attributed_layers(model, "linear")
    with pytest.raises(InputError, match="cannot be assigned to samples"):
        make_engine(model, layers, reduction="mean")(random_batch())
