"""Per-sample gradients against batch-of-one autograd over full logits."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import close, flat, oracle, random_targets, setup
from tiny_models import ARCHITECTURES, MIXTURES, random_batch, rows_of, tiny_model, with_lora

from influence.errors import InputError
from influence.gradients import (
    attributed_layers,
    block_layout,
    contractions,
    make_engine,
    mean_gradient,
)
from influence.gradients.backward import backpropagate
from influence.gradients.term import Formed, Term
from influence.projection import KINDS, layer_shapes, make_layerwise, make_projection

NAMES = (*ARCHITECTURES, "gemma3", *MIXTURES)
CASES = [(name, kind) for name in NAMES for kind in ("all", "lora", "all under lora")]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_vectors_losses_and_norms_match_autograd(architecture, kind):
    model, layers = setup(architecture, kind)
    batch = random_batch()
    losses, gradients = oracle(model, layers, batch)
    result = make_engine(model, layers, reduction="mean", full=True)(batch)
    for block in block_layout(layers):
        expected = gradients[block.name]
        end = block.offset + expected[0].numel()
        found = result.vectors[:, block.offset : end].view(len(expected), *block.shape)
        # Gemma's norms compute in float32 whatever the model's precision is.
        rough = architecture.startswith("gemma") and "norm" in block.name
        close(
            found,
            expected,
            f"{block.name}: padding leaks in, or X and D belong to other layers",
            rtol=1e-6 if rough else 1e-9,
        )
    close(result.norm, flat(gradients).norm(dim=1), "norm does not cover exactly these layers")
    torch.testing.assert_close(
        result.loss.double(), losses, rtol=1e-6, atol=1e-6, msg="loss of other tokens"
    )


@pytest.mark.parametrize("form", ["pair", "formed", "auto"])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("gemma2", "linear"), ("gpt2", "lora"), ("qwen2", "all"), ("gpt_oss", "all")],
)
@pytest.mark.parametrize("count", [1, 4])
def test_products_and_norms_match_explicit_gradients(architecture, kind, form, count):
    model, layers = setup(architecture, kind)
    batch = random_batch()
    _losses, gradients = oracle(model, layers, batch)
    targets = random_targets(layers, count)
    result = make_engine(model, layers, reduction="mean", targets=targets, form=form)(batch)
    close(result.products, flat(gradients) @ flat(targets).T, f"{form}: <g_i, G_k> is wrong")
    close(result.norm, flat(gradients).norm(dim=1), f"{form}: |g_i| is wrong")


@pytest.mark.parametrize("form", ["pair", "formed"])
def test_chunks_of_samples_change_nothing(form, monkeypatch):
    model, layers = setup("llama", "all")
    batch, targets = random_batch(), random_targets(layers, 2)
    whole = make_engine(model, layers, reduction="mean", targets=targets, form=form)(batch)
    monkeypatch.setattr("influence.gradients.contractions.TRANSIENT_BYTES", 20_000)
    parts = make_engine(model, layers, reduction="mean", targets=targets, form=form)(batch)
    close(parts.norm, whole.norm, "a chunk of samples was lost or added to other rows")
    close(parts.products, whole.products, "a chunk of samples was lost or added to other rows")


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "lora"), ("gpt2", "all"), ("gpt_oss", "all")]
)
@pytest.mark.parametrize("way", ["whole", "layerwise", "by token pairs"])
def test_norms_of_single_layers(architecture, kind, way):
    model, layers = setup(architecture, kind)
    batch = random_batch()
    _losses, gradients = oracle(model, layers, batch)
    options = {
        "whole": {"full": True},
        "layerwise": {
            "projection": make_layerwise(
                layer_shapes(layers), sketch="srht", layer_dim=16, seed=0, dtype=torch.float64
            )
        },
        "by token pairs": {"form": "pair"},
    }[way]
    result = make_engine(model, layers, reduction="mean", layer_norms=True, **options)(batch)
    expected = torch.stack([gradients[layer.name].flatten(1).norm(dim=1) for layer in layers], 1)
    close(result.layer_norms, expected, "a norm of a projection, or of another layer")
    close(result.norm, flat(gradients).norm(dim=1), "the whole norm is not that of all layers")


@pytest.mark.parametrize("reduction", ["mean", "sum", "sqrt"])
def test_reductions(reduction):
    model, layers = setup("qwen2", "all")
    batch = random_batch()
    losses, gradients = oracle(model, layers, batch, reduction)
    result = make_engine(model, layers, reduction=reduction)(batch)
    close(result.norm, flat(gradients).norm(dim=1), "gradient of another reduction")
    torch.testing.assert_close(
        result.loss.double(), losses, rtol=1e-6, atol=1e-6, msg="loss of another reduction"
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "phi", *MIXTURES])
def test_a_sample_has_one_gradient_in_every_batch(architecture):
    model, layers = setup(architecture, "all")
    batch = random_batch((9, 5, 12, 7))
    engine = make_engine(model, layers, reduction="mean", full=True)
    together = engine(batch)
    for rows in ([3], [1, 0], [2, 3, 1]):
        some = engine(rows_of(batch, rows))
        close(some.vectors, together.vectors[rows], f"rows {rows}: neighbours or padding leak in")
        close(some.norm, together.norm[rows], f"rows {rows}: neighbours or padding leak in")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(dtype):
    """Checks that sums over tokens are wide: the model's own rounding is all that is left."""
    reference = setup("llama", "all")
    batch = random_batch()
    expected = make_engine(*reference, reduction="mean", full=True)(batch)
    model, layers = setup("llama", "all", dtype)
    found = make_engine(model, layers, reduction="mean", full=True)(batch)
    cosine = F.cosine_similarity(found.vectors.double(), expected.vectors)
    assert cosine.min() > (1 - 1e-6 if dtype == torch.float32 else 0.99), f"cosine {cosine}"
    assert found.vectors.dtype == torch.float32, "sums over tokens in half precision"


@pytest.mark.parametrize(
    ("projection", "dim"), [*((kind, 128) for kind in KINDS), ("kronecker", 10**6)]
)
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "all"), ("gpt2", "all"), ("phi", "lora"), ("mixtral", "all"), ("gpt_oss", "all")],
)
def test_projection_in_the_backward_pass_is_that_of_the_gradient(
    architecture, kind, projection, dim
):
    model, layers = setup(architecture, kind)
    batch = random_batch()
    _losses, gradients = oracle(model, layers, batch)
    options = {"side": 8, "dim": dim, "seed": 0, "dtype": torch.float64}
    projected = make_projection(projection, layer_shapes(layers), **options)
    expected = projected.accumulator(len(batch.lengths))
    for layer in layers:
        for part, gradient in enumerate(gradients[layer.name].chunk(layer.parts, dim=1)):
            numbers = torch.full((len(gradient),), part)
            samples = torch.arange(len(gradient))
            formed = Formed(gradient, samples, numbers if layer.parts > 1 else None)
            projected.add_formed(layer.name, formed, expected)
    result = make_engine(model, layers, reduction="mean", projection=projected)(batch)
    close(result.vectors, expected, "hooks and explicit gradients are projected differently")
    close(result.norm, flat(gradients).norm(dim=1), "norms must be exact beside a sketch")
    engine = make_engine(model, layers, reduction="mean", projection=projected, exact_norms=False)
    result = engine(batch)
    close(result.vectors, expected, "another projection without exact norms")
    close(result.norm, expected.norm(dim=1), "not the norms of the projected vectors")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("qwen3", "all"), ("gpt2", "all"), ("gemma", "lora"), ("gpt_oss", "all"), ("mixtral", "all")],
)
def test_mean_gradient_matches_a_loop(architecture, kind, normalize):
    model, layers = setup(architecture, kind)
    batches = [random_batch(seed=0), random_batch((4, 11), seed=1)]
    rows = torch.cat([flat(oracle(model, layers, batch)[1]) for batch in batches])
    if normalize:
        rows = rows / rows.norm(dim=1, keepdim=True)
    sums, count = mean_gradient(model, layers, batches, reduction="mean", normalize=normalize)
    found = torch.cat([sums[layer.name].flatten() for layer in layers])
    close(found, rows.sum(dim=0), "weighted by something else than 1 or 1 / |g_i|")
    assert count == 6, "not every sample was counted"


@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_without_a_usable_gradient_is_named(normalize):
    model, layers = setup("llama", "linear")
    batches = [random_batch(seed=0), random_batch((4, 11), seed=1)]
    names = [["f row 0", "f row 1", "f row 2", "f row 3"], ["f row 7", "f row 9"]]
    token = next(t for t in batches[1].input_ids[1].tolist() if t not in batches[0].input_ids)
    with torch.no_grad():
        batches[1].input_ids[0][batches[1].input_ids[0] == token] = 1
        model.model.embed_tokens.weight[token] = float("nan")
    arguments = {"reduction": "mean", "normalize": normalize, "names": names}
    with pytest.raises(InputError, match=r"f row 9: .*nan"):
        mean_gradient(model, layers, batches, **arguments)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(InputError, match=r"f row 0: .* 0;"):
        mean_gradient(model, layers, batches, **arguments)


@pytest.mark.parametrize("form", ["pair", "formed", "auto"])
@pytest.mark.parametrize("lengths", [(2, 3), (9, 5, 12)])
def test_a_targets_products_do_not_depend_on_the_other_targets(form, lengths):
    """Bit for bit: which targets share a pass depends on what the cache holds."""
    model, layers = setup("qwen2", "all", torch.float32)
    batch, every = random_batch(lengths), random_targets(layers, 6, torch.float32)
    columns = {"one": slice(0, 1), "two": slice(1, 3), "three": slice(3, 6)}

    def run(*names: str):
        chosen = {
            layer: [matrices[columns[name]].clone() for name in names]
            for layer, matrices in every.items()
        }
        return make_engine(model, layers, reduction="mean", targets=chosen, form=form)(batch)

    together = run("one", "two", "three")
    for names in (["one"], ["two"], ["three"], ["three", "one"]):
        some = run(*names)
        where = [k for name in names for k in range(6)[columns[name]]]
        same = torch.equal(some.products, together.products[:, where])
        assert same, f"{form}: products with {names} alone have other bits than beside others"
        assert torch.equal(some.norm, together.norm), f"{form}: norms depend on the targets"
    _losses, gradients = oracle(model, layers, batch)
    expected = flat(gradients) @ flat(every).T
    close(together.products.float(), expected, "order of targets", rtol=1e-4)


def test_module_called_twice_in_one_forward_adds_up_before_squaring():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.up_proj = block.mlp.gate_proj
        block.self_attn.v_proj = model.model.layers[0].self_attn.v_proj
        block.post_attention_layernorm = model.model.norm
    layers = attributed_layers(model, "all")
    batch = random_batch()
    _losses, gradients = oracle(model, layers, batch)
    for form in ("pair", "formed"):
        targets = random_targets(layers, 2)
        result = make_engine(model, layers, reduction="mean", targets=targets, form=form)(batch)
        close(result.norm, flat(gradients).norm(dim=1), "uses squared before they were added up")
        close(result.products, flat(gradients) @ flat(targets).T, "a use was lost")


def test_subset_of_layers_and_a_layer_without_effect():
    model, layers = setup("llama", "linear")
    chosen = layers[8:11]
    batch = random_batch()
    _losses, gradients = oracle(model, chosen, batch)
    norm = make_engine(model, chosen, reduction="mean")(batch).norm
    close(norm, flat(gradients).norm(dim=1), "a subset must give the norm of the subset")


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_model_is_left_as_it_was(architecture):
    model, layers = setup(architecture, "all")
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    broken = random_batch()
    broken.labels[1] = -100
    engine = make_engine(model, layers, reduction="mean")
    engine(random_batch())
    mean_gradient(model, layers, [random_batch()], reduction="mean", normalize=True)
    with pytest.raises(InputError):
        engine(broken)
    assert all(p.grad is None for p in model.parameters()), "autograd computed weight gradients"
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}, "mode not restored"
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not left, "hooks stay on the model"
    assert not any("forward" in vars(m) for m in model.modules()), "a replaced forward stays"


def test_dropout_is_off():
    model = with_lora(tiny_model("llama"))
    layers = attributed_layers(model, "lora")
    engine = make_engine(model, layers, reduction="mean", full=True)
    expected = engine(random_batch()).vectors
    model.train()
    close(engine(random_batch()).vectors, expected, "dropout was active")


def test_inputs_are_freed_during_the_backward_pass():
    """The graph lives to the end of the pass; what the hooks keep must not."""
    model, layers = setup("llama", "linear")
    refs: list[weakref.ref] = []
    alive: list[int] = []

    def watch(layer, terms):
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(terms[0].x))

    backpropagate(model, layers, random_batch(), reduction="mean", consume=watch)
    assert len(alive) == len(layers)
    assert max(alive) <= 1, f"inputs of {max(alive)} finished layers are still held"


@pytest.mark.parametrize("exact_norms", [False, True])
def test_inputs_that_only_a_sketch_needs_do_not_live_until_the_backward_pass(exact_norms):
    model, layers = setup("llama", "linear")
    projected = make_projection("kronecker", layer_shapes(layers), side=8, dim=64, seed=0)
    refs: list[weakref.ref] = []
    alive: list[int] = []
    for block in model.model.layers:
        # The product of gate and up, which autograd has no use for.
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _m, args: refs.append(weakref.ref(args[0].untyped_storage()))
        )
    model.lm_head.register_forward_hook(
        lambda *_: alive.append(sum(ref() is not None for ref in refs))
    )
    make_engine(model, layers, reduction="mean", projection=projected, exact_norms=exact_norms)(
        random_batch()
    )
    expected = len(model.model.layers) if exact_norms else 0
    assert alive == [expected], "inputs are held beside their sketches"


@pytest.mark.parametrize("form", ["pair", "formed"])
def test_float32_sums_over_a_large_layer_keep_their_precision(form):
    """A float32 sum over a million numbers in one go is off by more than 1e-5."""
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(2, 40, width, generator=generator) for width in (1200, 900))
    gradients = torch.bmm(d.double().mT, x.double())
    expected = gradients.square().sum((1, 2))
    if form == "pair":
        found = contractions.squared_norms([Term(x, d)], 2)
    else:
        found = contractions.formed_squared_norms(torch.bmm(d.mT, x))
    torch.testing.assert_close(
        found, expected, rtol=2e-6, atol=0.0, msg="summed in float32 over too many numbers"
    )
    targets = gradients[:1].float()
    if form == "pair":
        products = contractions.pair_products(Term(x, d), targets, 1, 2)
    else:
        formed = Formed(torch.bmm(d.mT, x), slice(0, 2), None)
        products = contractions.formed_products(formed, targets)
    torch.testing.assert_close(
        products,
        gradients.flatten(1) @ targets.double().flatten(1).mT,
        rtol=0.0,
        atol=5e-6 * float(expected.max()),
        msg="inner product summed in float32 over too many numbers",
    )


def test_targets_that_do_not_fit_are_named():
    model, layers = setup("llama", "all")
    targets = random_targets(layers, 2)
    name = layers[3].name
    targets[name] = targets[name].mT.contiguous()[:, :1]
    with pytest.raises(InputError, match=name):
        make_engine(model, layers, reduction="mean", targets=targets)
    del targets[name]
    with pytest.raises(InputError, match=name):
        make_engine(model, layers, reduction="mean", targets=targets)
