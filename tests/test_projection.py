"""Projections: unbiased, of the variance that theory states, equal from factors and formed."""

from __future__ import annotations

import pytest
import torch
from projections import LAYERS, flat, gradients, projected, projector

from influence.errors import InputError
from influence.gradients.term import Formed, OneHot, Term
from influence.projection import (
    KINDS,
    LayerShape,
    half_products,
    make_kronecker,
    make_layerwise,
    rademacher_projection,
)
from influence.projection.layerwise import SKETCHES
from influence.projection.randomness import places
from influence.projection.srht import hadamard

SETTINGS = [
    ("kronecker", {"side": 8, "dim": 32}),
    ("kronecker", {"side": 8, "dim": 4096}),
    ("kronecker", {"side": 2, "dim": 64}),
    ("srht", {"side": 2, "dim": 32}),
    ("rademacher", {"side": 2, "dim": 32}),
    ("countsketch", {"side": 2, "dim": 64}),
]


def layerwise(sketch: str, seed: int = 0, layer_dim: int = 64, layers=LAYERS):
    options = {"sketch": sketch, "layer_dim": layer_dim, "seed": seed, "dtype": torch.float64}
    return make_layerwise(layers, **options)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_layers_are_projected_apart_and_small_ones_kept(sketch):
    values = gradients(3)
    projection = layerwise(sketch)
    found = projected(projection, values)
    assert [name for name, _, _ in projection.blocks] == [layer.name for layer in LAYERS]
    assert projection.dim == sum(length for _, _, length in projection.blocks)
    for layer, (name, offset, length) in zip(LAYERS, projection.blocks, strict=True):
        block, own = found[:, offset : offset + length], values[name]
        if layer.size <= 64:
            expected = own.flatten(1)
        else:
            one = projector(sketch, [layer], side=2, dim=64, seed=0)
            expected = projected(one, {name: own})
        torch.testing.assert_close(
            block, expected, rtol=1e-12, atol=1e-12, msg=f"{name}: not in its own columns"
        )
    alone = layerwise(sketch, layers=LAYERS[1:2])
    _, start, length = projection.blocks[1]
    torch.testing.assert_close(
        projected(alone, {"b": values["b"]}),
        found[:, start : start + length],
        msg="the randomness of a layer depends on the others",
    )


@pytest.mark.parametrize("sketch", SKETCHES)
def test_every_layer_is_unbiased_in_its_own_columns(sketch):
    layers = [LayerShape("b", 17, 9), LayerShape("e", 6, 5, parts=3)]
    values = gradients(2, layers)
    found = {"b": [], "e": []}
    for seed in range(300):
        projection = layerwise(sketch, seed, 16, layers)
        v = projected(projection, values)
        for name, offset, length in projection.blocks:
            block = v[:, offset : offset + length]
            found[name].append(block[0] @ block[1])
    for name, samples in found.items():
        truth = values[name][0].flatten() @ values[name][1].flatten()
        score = float(z_scores(torch.stack(samples), truth))
        assert abs(score) < 4.5, f"layer {name} is biased: z = {score:.1f}"


def z_scores(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    error = samples.std(dim=0) / len(samples) ** 0.5
    return (samples.mean(dim=0) - truth) / error.clamp_min(1e-12)


@pytest.mark.parametrize(
    ("kind", "options"), [*SETTINGS, *((f"layerwise {sketch}", {}) for sketch in SKETCHES)]
)
def test_factors_and_formed_gradients_have_one_projection(kind, options):
    generator = torch.Generator().manual_seed(3)
    if kind.startswith("layerwise"):
        projection = layerwise(kind.split()[1])
    else:
        projection = projector(kind, seed=5, **options)
    streamed, explicit = projection.accumulator(3), projection.accumulator(3)
    for layer in LAYERS:
        groups = 3 * layer.parts
        x = torch.randn(groups, 6, layer.in_, generator=generator, dtype=torch.float64)
        d = torch.randn(groups, 6, layer.out, generator=generator, dtype=torch.float64)
        index = torch.randint(layer.out, (groups, 6), generator=generator)
        one_hot = torch.nn.functional.one_hot(index, layer.out).double()
        sample, part = torch.arange(groups) % 3, torch.arange(groups) // 3
        owners = (sample, part) if layer.parts > 1 else (None, None)
        for left, dense in ((d, d), (OneHot(index, layer.out), one_hot)):
            projection.add_term(layer.name, Term(x, left, *owners), streamed)
            formed = Formed(torch.einsum("bto,bti->boi", dense, x), sample, owners[1])
            projection.add_formed(layer.name, formed, explicit)
    torch.testing.assert_close(
        streamed,
        explicit,
        rtol=1e-10,
        atol=1e-10,
        msg="in and out sides swapped, or halves or parts mixed up, in one of the two paths",
    )


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_inner_products_and_norms_are_unbiased(kind, options):
    values = gradients(3)
    samples = []
    for seed in range(300):
        v = projected(projector(kind, seed=seed, **options), values)
        samples.append(v @ v.T)
    scores = z_scores(torch.stack(samples), flat(values) @ flat(values).T)
    assert scores.abs().max() < 4.5, f"biased: a scale is wrong (z = {scores})"


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
@pytest.mark.parametrize("name", ["a", "d", "e"])
def test_every_layer_keeps_its_share(kind, options, name):
    """A layer alone must not be re-weighted by its size: it is unbiased by itself."""
    values = gradients(2)
    for other in values:
        if other != name:
            values[other] = torch.zeros_like(values[other])
    found = []
    for seed in range(300):
        v = projected(projector(kind, seed=seed, **options), values)
        found.append(v[0] @ v[1])
    truth = flat(values)[0] @ flat(values)[1]
    samples = torch.stack(found)
    z = float((samples.mean() - truth) / (samples.std() / 300**0.5).clamp_min(1e-12))
    assert abs(z) < 4.5 or torch.allclose(samples, truth.expand(300)), f"layer {name}: z = {z:.1f}"


def test_hadamard_is_the_matrix():
    for size in (1, 2, 8, 64, 256):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix)
        x = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.testing.assert_close(
            hadamard(x), x @ matrix, rtol=1e-10, atol=1e-10, msg=f"size {size}: another transform"
        )


def test_places_are_distinct_within_a_run_and_uniform():
    found = torch.stack([places(7, 5, seed, "x") for seed in range(400)])
    assert all(len(set(row[:5].tolist())) == 5 for row in found), "two numbers in one slot"
    counts = torch.stack([(found == slot).sum(0) for slot in range(5)]).double()
    assert (counts - 80).abs().max() < 4.5 * (400 * 0.2 * 0.8) ** 0.5, "slots are not uniform"


def test_wide_sides_and_dim_are_exact():
    values = gradients(3)
    vectors = projected(projector("kronecker", side=40, dim=10**6, seed=0), values)
    torch.testing.assert_close(
        half_products(vectors, vectors),
        (flat(values) @ flat(values).T).expand(2, -1, -1),
        rtol=1e-10,
        atol=1e-10,
        msg="a side that fits must be kept as it is, in both halves",
    )


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_halves_are_independent_and_average_to_the_product(kind, options):
    values = gradients(2)
    halves = []
    for seed in range(400):
        v = projected(projector(kind, seed=seed, **options), values)
        products = half_products(v, v)
        torch.testing.assert_close(
            products.mean(dim=0), v @ v.T, rtol=1e-10, atol=1e-10, msg="halves do not average"
        )
        halves.append(products[:, 0, 1])
    pairs = torch.stack(halves)
    correlation = float(torch.corrcoef(pairs.T)[0, 1])
    assert abs(correlation) < 0.2, f"halves share randomness (correlation {correlation:.2f})"
    scores = z_scores(pairs, (flat(values)[0] @ flat(values)[1]).expand(2))
    assert scores.abs().max() < 4.5, "each half must be unbiased by itself"


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_projection_depends_on_seed_and_layer_name_only(kind, options):
    values = gradients(2)
    first = projected(projector(kind, seed=1, **options), values)
    again = projected(projector(kind, seed=1, **options), values)
    assert torch.equal(first, again), "not reproducible"
    other = projected(projector(kind, seed=2, **options), values)
    assert not torch.allclose(first, other), "the seed is ignored"
    same = [LayerShape("p", 9, 9), LayerShape("q", 9, 9)]
    projection = projector(kind, same, seed=1, **options)
    gradient = torch.randn(1, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    parts = []
    for layer in same:
        part = projected(projection, {layer.name: gradient})
        parts.append(part[part != 0])
    assert parts[0].shape != parts[1].shape or not torch.allclose(parts[0], parts[1]), (
        "two layers share their directions"
    )


def test_known_numbers_stay():
    """Stored vectors are compared with later ones: the randomness must never change."""
    x = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    found = rademacher_projection(x, 3, 7) * 3**0.5
    expected = torch.tensor([[-24.0, -10.0, 12.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg="randomness changed")
    layer = [LayerShape("w", 2, 4)]
    sums = {}
    for kind in KINDS:
        v = projected(projector(kind, layer, side=2, dim=4, seed=7), {"w": x.view(1, 1, 2, 4)})
        sums[kind] = [round(float(value), 6) for value in v[0]]
    assert sums == {
        "kronecker": [2.828427, 16.970563],
        "srht": [12.0, -14.0, -9.0, -1.0],
        "rademacher": [-17.0, -7.0, 1.0, -5.0],
        "countsketch": [-2.828427, -2.828427, -4.242641, -9.899495],
    }, "randomness changed: raise FORMAT_VERSION if that is meant"


@pytest.mark.parametrize("width", [40, 600])
def test_plain_projection_is_unbiased(width):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, width, generator=generator, dtype=torch.float64) + 0.5
    samples = []
    for seed in range(300):
        v = rademacher_projection(x, 16, seed)
        assert v.shape == (3, 16), "wrong number of dimensions"
        samples.append(v @ v.T)
    scores = z_scores(torch.stack(samples), x @ x.T)
    assert scores.abs().max() < 4.5, f"biased (z = {scores})"


def test_narrow_rows_are_left_alone_and_rows_do_not_depend_on_each_other():
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(rademacher_projection(x, 300, 0), x), "projected although it fits"
    torch.testing.assert_close(
        rademacher_projection(x, 20, 0)[2:3],
        rademacher_projection(x[2:3], 20, 0),
        rtol=1e-10,
        atol=1e-10,
        msg="row-dependent",
    )


@pytest.mark.parametrize(("side", "dim", "key"), [(7, 64, "side"), (0, 64, "side"), (8, 63, "dim")])
def test_odd_sizes_name_the_key(side, dim, key):
    with pytest.raises(InputError, match=rf"gradients\.{key}"):
        make_kronecker(LAYERS, side=side, dim=dim, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_layer_name_is_refused(kind):
    with pytest.raises(InputError, match="distinct"):
        projector(kind, [LayerShape("a", 3, 3), LayerShape("a", 4, 4)], side=4, dim=16, seed=0)
    with pytest.raises(InputError, match=r"gradients\.projection.*kronecker"):
        projector("fourier", side=4, dim=16, seed=0)
