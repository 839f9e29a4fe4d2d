from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, random_batch, rows_of, tiny_model, with_lora
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, FalconConfig, MixtralConfig
from transformers.pytorch_utils import Conv1D

from influence.blocks import find_decoder
from influence.jvp import Tangents, draw_tangents, make_jvp_embedder

COUNT = 2


class NoFloat32(TorchFunctionMode):
    """Let norms and softmax compute in float64 where the model's code asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {
            name: wide.get(a, a) if isinstance(a, torch.dtype) else a
            for name, a in (kwargs or {}).items()
        }
        return (
            func(*args, **kwargs).double() if func is torch.Tensor.float else func(*args, **kwargs)
        )


@pytest.fixture
def exact():
    with NoFloat32():
        yield


def formed(model, drawn: Tangents, index: int) -> dict[str, torch.Tensor]:
    """Tangent number `index` of every parameter, as large as the parameter."""
    tangents = {name: tangent[index] for name, tangent in drawn.dense.items()}
    for name, linear in drawn.linear.items():
        matrix = torch.outer(linear.u[index], linear.v[index])
        module = model.get_submodule(name)
        tangents[f"{name}.weight"] = matrix.T if isinstance(module, Conv1D) else matrix
        if linear.bias is not None:
            tangents[f"{name}.bias"] = linear.bias[index]
    return tangents


def last_hidden(model, parameters, ids, count, final_norm=True):
    """The whole model on one sample without padding; nothing stopped, nothing hooked."""
    decoder = find_decoder(model)
    call = {"input_ids": ids, "output_hidden_states": True, "use_cache": False}
    states = functional_call(model, parameters, (), call).hidden_states
    hidden = states[count][:, -1]
    # transformers' last hidden state is past the norm already
    return hidden if count == len(decoder.blocks) or not final_norm else decoder.final_norm(hidden)


def slow_embedding(model, batch, drawn, tangents, count=COUNT, final_norm=True):
    parameters = dict(model.named_parameters())
    rows = []
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :length]
        parts = []
        for index in range(tangents):
            direction = formed(model, drawn, index)
            values = {name: parameters[name].detach() for name in direction}
            with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                parts.append(
                    jvp(
                        lambda p, ids=ids: last_hidden(model, p, ids, count, final_norm),
                        (values,),
                        (direction,),
                    )[1][0]
                )
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def check(model, batch, tangent, count=COUNT, tangents=2, final_norm=True):
    options = {"blocks": count, "tangents": tangents, "tangent": tangent, "seed": 3}
    embed = make_jvp_embedder(model, **options, final_norm=final_norm)
    drawn = draw_tangents(model, **options)
    expected = slow_embedding(model, batch, drawn, tangents, count, final_norm)
    assert expected.abs().mean() > 1e-3, "the test is empty: nothing moves"
    torch.testing.assert_close(
        embed(batch.input_ids, batch.lengths),
        expected,
        rtol=1e-9,
        atol=1e-10,
        msg="not the derivative along these tangents: a term of the product rule, a parameter "
        "or the row's own last token is missing",
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("tangent", ["rank1", "dense"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embedding_is_the_derivative_of_the_whole_model(architecture, tangent):
    check(tiny_model(architecture), random_batch(), tangent)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_are_parameters_like_others(architecture):
    model = with_lora(tiny_model(architecture))
    check(model, random_batch(lengths=(4, 7)), "rank1")
    drawn = draw_tangents(model, blocks=COUNT, tangents=1, tangent="rank1", seed=0)
    moved = set(formed(model, drawn, 0))
    prefixes = tuple(f"{find_decoder(model).block_prefix}.{i}." for i in range(COUNT))
    expected = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    assert moved == expected, "a parameter of the blocks has no tangent, or one outside has"


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("tangent", ["rank1", "dense"])
def test_experts_and_blocks_that_add_in_place(tangent):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 4}
    torch.manual_seed(0)
    for config in (MixtralConfig(**sizes, **experts), FalconConfig(**sizes)):
        config.initializer_range = 0.3
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        before = model.get_experts_implementation()
        embed = make_jvp_embedder(model, blocks=COUNT, tangents=2, tangent=tangent, seed=3)
        batch = random_batch(lengths=(4, 7))
        embedding = embed(batch.input_ids, batch.lengths)
        assert model.get_experts_implementation() == before, "the experts' kernel was not restored"
        drawn = draw_tangents(model, blocks=COUNT, tangents=2, tangent=tangent, seed=3)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(
            embedding,
            slow_embedding(model, batch, drawn, tangents=2),
            rtol=1e-9,
            atol=1e-10,
            msg=f"{config.model_type}: an expert's tangent or a part of the block is missing",
        )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("count", "final_norm"), [(1, True), (3, True), (2, False)])
def test_any_number_of_blocks_with_and_without_the_norm(count, final_norm):
    check(tiny_model("llama"), random_batch(lengths=(4, 7)), "rank1", count, 3, final_norm)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("tangent", ["rank1", "dense"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_embedding_is_the_limit_of_central_differences(architecture, tangent):
    model, batch = tiny_model(architecture), random_batch(lengths=(6, 6))
    options = {"blocks": COUNT, "tangents": 2, "tangent": tangent, "seed": 5}
    embedding = make_jvp_embedder(model, **options)(batch.input_ids, batch.lengths)
    drawn = draw_tangents(model, **options)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    step = 1e-5
    differences = []
    for index in range(2):
        direction = formed(model, drawn, index)
        ends = []
        for sign in (step, -step):
            moved = {name: parameters[name] + sign * d for name, d in direction.items()}
            with torch.no_grad():
                ends.append(last_hidden(model, moved, batch.input_ids, COUNT))
        differences.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(
        embedding,
        torch.cat(differences, dim=1),
        rtol=1e-5,
        atol=1e-5 * embedding.abs().max().item(),
        msg="forward-mode derivative and parameter differences disagree: wrong tangents or order",
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mistral"])
def test_a_sample_embeds_the_same_in_any_batch(architecture):
    model, batch = tiny_model(architecture), random_batch()
    embed = make_jvp_embedder(model, blocks=COUNT, tangents=2, tangent="rank1", seed=0)
    together = embed(batch.input_ids, batch.lengths)
    # Other padding ids, too: what stands behind the last token must not matter.
    noise = torch.randint(3, VOCAB, batch.input_ids.shape)
    behind = torch.arange(batch.input_ids.shape[1]) >= batch.lengths.unsqueeze(1)
    other = embed(torch.where(behind, noise, batch.input_ids), batch.lengths)
    alone = [rows_of(batch, [row]) for row in range(4)]
    alone = torch.cat([embed(one.input_ids, one.lengths) for one in alone])
    message = "padding or the neighbours leak into a sample's embedding"
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10, msg=message)
    torch.testing.assert_close(together, other, rtol=1e-10, atol=1e-10, msg=message)


def test_all_tangents_share_one_pass_over_the_needed_blocks_only():
    model, batch = tiny_model("llama"), random_batch()
    embed = make_jvp_embedder(model, blocks=COUNT, tangents=3, tangent="rank1", seed=0)
    calls = [0, 0, 0]

    def counting(number):
        def hook(module, args):
            calls[number] += 1

        return hook

    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(counting(number))
    embed(batch.input_ids, batch.lengths)
    assert calls == [1, 1, 0], "later blocks ran, or the values were computed once per tangent"


@pytest.mark.parametrize("tangent", ["rank1", "dense"])
def test_model_is_left_as_it_was(tangent):
    model, batch = with_lora(tiny_model("gpt2")), random_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    leaves = {name: id(p) for name, p in model.named_parameters()}
    logits = model(batch.input_ids).logits
    embed = make_jvp_embedder(model, blocks=COUNT, tangents=2, tangent=tangent, seed=0)
    embed(batch.input_ids, batch.lengths)
    with pytest.raises(IndexError):
        embed(batch.input_ids + 1000, batch.lengths)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    assert {name: id(p) for name, p in model.named_parameters()} == leaves, "parameter replaced"
    for name, module in model.named_modules():
        left = len(module._forward_hooks) + len(module._forward_pre_hooks)
        assert left == 0, f"a hook was left on {name}"
    assert torch.equal(model(batch.input_ids).logits, logits), "the model computes otherwise now"


def test_float32_model_agrees_with_the_float64_one():
    batch = random_batch()
    results = []
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("llama", dtype=dtype)
        embed = make_jvp_embedder(model, blocks=COUNT, tangents=2, tangent="rank1", seed=0)
        results.append(embed(batch.input_ids, batch.lengths).double())
    scale = results[1].abs().max().item()
    torch.testing.assert_close(
        results[0],
        results[1],
        rtol=1e-4,
        atol=1e-4 * scale,
        msg="the tangents depend on the model's dtype",
    )


def test_tangents_are_standard_normal_and_of_full_rank_or_one():
    model = tiny_model("qwen2")
    options = {"blocks": COUNT, "tangents": 2, "seed": 0}
    dense = draw_tangents(model, tangent="dense", **options)
    rank1 = draw_tangents(model, tangent="rank1", **options)
    assert not dense.linear
    name = "model.layers.0.mlp.up_proj"
    assert torch.linalg.matrix_rank(dense.dense[f"{name}.weight"][0]) == 32
    assert rank1.linear[name].u.shape[1] == 48, "u belongs to the outputs"
    factors = [f for one in rank1.linear.values() for f in (one.u, one.v, one.bias)]
    for values in (list(dense.dense.values()), [f for f in factors if f is not None]):
        flat = torch.cat([value.flatten() for value in values])
        # Five standard errors of the mean (1) and of the mean square (sqrt 2).
        limit = 5 / len(flat) ** 0.5
        assert flat.mean().abs() < limit, "tangents have a mean"
        assert (flat.square().mean() - 1).abs() < limit * 2**0.5, "tangents' variance is not 1"
        assert len(flat.unique()) == len(flat), "two parameters or tangents share random numbers"


def test_tangents_depend_on_seed_name_and_number_alone():
    def draw(model, **options):
        return formed(model, draw_tangents(model, tangent="rank1", **options), 0)

    few = draw(tiny_model("llama"), blocks=1, tangents=1, seed=4)
    many = draw(tiny_model("llama", seed=9), blocks=3, tangents=3, seed=4)
    other = draw(tiny_model("llama"), blocks=1, tangents=1, seed=5)
    for name, tangent in few.items():
        assert torch.equal(tangent, many[name]), f"{name}: depends on the weights or the counts"
        assert not torch.allclose(tangent, other[name]), f"{name}: does not depend on the seed"


def test_an_empty_row_is_an_error():
    model, batch = tiny_model("llama"), random_batch()
    embed = make_jvp_embedder(model, blocks=1, tangents=1, tangent="rank1", seed=0)
    with pytest.raises(ValueError, match="lengths"):
        embed(batch.input_ids, torch.tensor([9, 0, 12, 7]))
    with pytest.raises(ValueError, match="lengths"):
        embed(batch.input_ids, torch.tensor([9, 5, 13, 7]))
