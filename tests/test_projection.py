from __future__ import annotations

import pytest
import torch

from influence.errors import InputError
from influence.projection import (
    countsketch,
    half_products,
    make_sketch,
    rademacher_projection,
)

# The last two have a side small enough to be kept exactly.
LAYERS = [("a", 12, 20), ("b", 17, 9), ("c", 2, 15), ("d", 3, 2)]


def gradients(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Low-rank gradients with something in common, so that inner products are far from 0."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, out, in_ in LAYERS:
        common = torch.randn(out, in_, generator=generator, dtype=torch.float64)
        own = torch.randn(rows, out, in_, generator=generator, dtype=torch.float64)
        result[name] = common + own
    return result


def sketched(values: dict[str, torch.Tensor], **options) -> torch.Tensor:
    sketch = make_sketch(LAYERS, dtype=torch.float64, **options)
    vectors = sketch.accumulator(len(values["a"]))
    for name, gradient in values.items():
        sketch.project_gradient(name, gradient, vectors)
    return vectors


def exact_products(values: dict[str, torch.Tensor]) -> torch.Tensor:
    flat = torch.cat([gradient.flatten(1) for gradient in values.values()], dim=1)
    return flat @ flat.T


def z_scores(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    error = samples.std(dim=0) / len(samples) ** 0.5
    return (samples.mean(dim=0) - truth) / error.clamp_min(1e-12)


@pytest.mark.parametrize(("side", "dim"), [(8, 64), (8, 4096), (4, 16)])
def test_tokens_and_explicit_gradients_have_one_sketch(side, dim):
    generator = torch.Generator().manual_seed(3)
    sketch = make_sketch(LAYERS, side=side, dim=dim, seed=5, dtype=torch.float64)
    streamed, explicit = sketch.accumulator(3), sketch.accumulator(3)
    for name, out, in_ in LAYERS:
        x = torch.randn(3, 6, in_, generator=generator, dtype=torch.float64)
        d = torch.randn(3, 6, out, generator=generator, dtype=torch.float64)
        sketch.apply_layer(name, x, d, streamed)
        sketch.project_gradient(name, torch.einsum("bto,bti->boi", d, x), explicit)
    torch.testing.assert_close(
        streamed,
        explicit,
        rtol=1e-10,
        atol=1e-10,
        msg="in and out sides swapped, or halves mixed up, in one of the two paths",
    )


@pytest.mark.parametrize(("side", "dim"), [(8, 32), (8, 4096)])
def test_inner_products_and_norms_are_unbiased(side, dim):
    values = gradients(3)
    samples = torch.stack(
        [v @ v.T for v in (sketched(values, side=side, dim=dim, seed=seed) for seed in range(300))]
    )
    scores = z_scores(samples, exact_products(values))
    assert scores.abs().max() < 4.5, f"biased: a scale is wrong (z = {scores})"


def test_wide_sides_and_dim_are_exact():
    values = gradients(3)
    vectors = sketched(values, side=40, dim=10**6, seed=0)
    torch.testing.assert_close(
        half_products(vectors, vectors),
        exact_products(values).expand(2, -1, -1),
        rtol=1e-10,
        atol=1e-10,
        msg="a side that fits must be kept as it is, in both halves",
    )


def test_error_falls_with_side():
    values = gradients(2)
    truth = exact_products(values)[0, 1]
    variances = []
    for side in (4, 8, 16):
        found = torch.stack(
            [
                (v[0] @ v[1])
                for v in (sketched(values, side=side, dim=10**5, seed=s) for s in range(200))
            ]
        )
        variances.append(float((found - truth).square().mean()))
    # The error of a two-sided projection falls at least like 1 / side; halves by far more here.
    assert variances[0] > 1.6 * variances[1] > 1.6**2 * variances[2], (
        f"more directions do not help ({variances}): directions are repeated"
    )


@pytest.mark.parametrize("dim", [32, 10**5])
def test_halves_are_independent_and_average_to_the_product(dim):
    values = gradients(2)
    halves = []
    for seed in range(400):
        v = sketched(values, side=4, dim=dim, seed=seed)
        products = half_products(v, v)
        torch.testing.assert_close(
            products.mean(dim=0), v @ v.T, rtol=1e-10, atol=1e-10, msg="halves do not average"
        )
        halves.append(products[:, 0, 1])
    pairs = torch.stack(halves)
    correlation = float(torch.corrcoef(pairs.T)[0, 1])
    assert abs(correlation) < 0.2, f"halves share randomness (correlation {correlation:.2f})"
    scores = z_scores(pairs, exact_products(values)[0, 1].expand(2))
    assert scores.abs().max() < 4.5, "each half must be unbiased by itself"


def test_sketch_depends_on_seed_and_layer_name_only():
    values = gradients(2)
    first = sketched(values, side=4, dim=10**5, seed=1)
    assert torch.equal(first, sketched(values, side=4, dim=10**5, seed=1)), "not reproducible"
    other = sketched(values, side=4, dim=10**5, seed=2)
    assert not torch.allclose(first, other), "the seed is ignored"
    same = [("p", 9, 9), ("q", 9, 9)]
    sketch = make_sketch(same, side=4, dim=10**5, seed=1, dtype=torch.float64)
    gradient = torch.randn(1, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    parts = []
    for name, _out, _in in same:
        part = sketch.accumulator(1)
        sketch.project_gradient(name, gradient, part)
        parts.append(part[part != 0])
    assert not torch.allclose(parts[0], parts[1]), "two layers share their directions"


def test_known_numbers_stay():
    """Stored vectors are compared with later ones: the randomness must never change."""
    x = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    found = torch.cat([countsketch(x, 3, 7), rademacher_projection(x, 3, 7) * 3**0.5], dim=1)
    expected = torch.tensor([[2.0, -9.0, 3.0, -24.0, -10.0, 12.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg="randomness changed")


@pytest.mark.parametrize("project", [countsketch, rademacher_projection])
@pytest.mark.parametrize("width", [40, 600])
def test_plain_projections_are_unbiased(project, width):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, width, generator=generator, dtype=torch.float64) + 0.5
    samples = []
    for seed in range(300):
        v = project(x, 16, seed)
        assert v.shape == (3, 16), "wrong number of dimensions"
        samples.append(v @ v.T)
    scores = z_scores(torch.stack(samples), x @ x.T)
    assert scores.abs().max() < 4.5, f"biased (z = {scores})"


@pytest.mark.parametrize("project", [countsketch, rademacher_projection])
def test_narrow_rows_are_left_alone_and_rows_do_not_depend_on_each_other(project):
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(project(x, 300, 0), x), "projected although it fits"
    torch.testing.assert_close(
        project(x, 20, 0)[2:3], project(x[2:3], 20, 0), rtol=1e-10, atol=1e-10, msg="row-dependent"
    )


@pytest.mark.parametrize(("side", "dim", "key"), [(7, 64, "side"), (0, 64, "side"), (8, 63, "dim")])
def test_odd_sizes_name_the_key(side, dim, key):
    with pytest.raises(InputError, match=rf"gradients\.{key}"):
        make_sketch(LAYERS, side=side, dim=dim, seed=0)


def test_repeated_layer_name_is_refused():
    with pytest.raises(InputError, match="distinct"):
        make_sketch([("a", 3, 3), ("a", 4, 4)], side=4, dim=16, seed=0)
