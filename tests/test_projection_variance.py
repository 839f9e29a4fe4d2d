"""Projections have the variance that theory states for them."""

from __future__ import annotations

import pytest
import torch
from projections import flat, gradients, projected, projector

from influence.projection import LayerShape
from influence.projection.side import make_side


def sign_variance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Variance of (s'x)(s'y) for a vector s of independent signs."""
    squares = (x.square() * y.square()).sum()
    return float(x.square().sum() * y.square().sum() + (x @ y) ** 2 - 2 * squares)


def measured(kind: str, layers, values, seeds: int = 1500, **options) -> float:
    found = []
    for seed in range(seeds):
        v = projected(projector(kind, layers, seed=seed, **options), values)
        found.append(float(v[0] @ v[1]))
    return float(torch.tensor(found, dtype=torch.float64).var())


def test_variance_of_signs_and_of_the_hadamard_transform():
    layers = [LayerShape("a", 5, 6)]
    values = gradients(2, layers)
    x, y = flat(values)
    one = sign_variance(x, y)
    # dim/2 independent sums in either half.
    found = measured("rademacher", layers, values, side=2, dim=16)
    assert found == pytest.approx(one / 16, rel=0.15), "not as many independent sums as stated"
    # 30 numbers are padded to 32; k of the 32 rows are drawn without replacement in each half.
    k = 8
    found = measured("srht", layers, values, side=2, dim=2 * k)
    assert found == pytest.approx(one / (2 * k) * (32 - k) / 31, rel=0.15)


def met_variance(x: torch.Tensor, y: torch.Tensor, directions: int) -> float:
    """Variance of a half's estimate of x'y, in a loop over the numbers that meet."""
    total = 0.0
    for i in range(len(x)):
        for j in range(i + directions, len(x), directions):
            total += float((x[i] * y[j] + x[j] * y[i]) ** 2)
    return total


def test_variance_of_the_two_sided_projection():
    """Of rank-one gradients a b' and c d' it is a product of two independent estimates."""
    generator = torch.Generator().manual_seed(2)
    layers = [LayerShape("a", 9, 11)]
    a, c = torch.randn(2, 9, generator=generator, dtype=torch.float64) + 0.5
    b, d = torch.randn(2, 11, generator=generator, dtype=torch.float64) + 0.5
    values = {"a": torch.stack([torch.outer(a, b), torch.outer(c, d)]).unsqueeze(1)}
    s = 4
    left, right = met_variance(a, c, s), met_variance(b, d, s)
    m, n = float(a @ c) ** 2, float(b @ d) ** 2
    expected = ((left + m) * (right + n) - m * n) / 2  # the mean of two halves
    found = measured("kronecker", layers, values, side=2 * s, dim=10**5)
    assert found == pytest.approx(expected, rel=0.15), "not `side`/2 directions with free signs"


def test_a_side_is_one_matrix_with_one_sign_a_number():
    side = make_side(37, 4, ("x",), torch.float64, "cpu")
    assert side is not None
    x = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        side.project(x),
        x @ side.matrix(),
        rtol=1e-12,
        atol=1e-12,
        msg="the sketch of a row is another map than the matrix that a GPU or an embedding uses",
    )
    for half in side.matrix().view(37, 2, 4).unbind(1):
        assert torch.equal(half.abs(), torch.eye(4).double().repeat(10, 1)[:37]), "not i mod s"


def test_sides_have_the_variance_of_dense_directions_whatever_the_numbers():
    """The same two numbers do not meet in every layer, so heads or blocks may repeat themselves."""
    generator = torch.Generator().manual_seed(5)
    directions, width = 32, 576
    # Large numbers at the same place of every head of 64: with s = 32 in all layers all would meet.
    x, y = torch.randn(2, width, generator=generator, dtype=torch.float64)
    x[5::64], y[5::64] = 6.0, 6.0
    sides = [make_side(width, directions, (seed,), torch.float64, "cpu") for seed in range(300)]
    counts = torch.tensor([side.directions for side in sides]).double()
    assert counts.mean() == pytest.approx(directions, abs=0.5)
    assert set(counts.tolist()) == {29, 31, 33, 35}, "not odd, or not a tenth more or less"
    mean = sum(met_variance(x, y, count) for count in (29, 31, 33, 35)) / 4
    assert mean == pytest.approx(sign_variance(x, y) / directions, rel=0.3), "numbers of heads meet"
    found = []
    for side in sides:
        left, right = (side.project(v).view(2, -1)[0] for v in (x, y))
        found.append(float(left @ right - x @ y))
    assert float(torch.tensor(found).square().mean()) == pytest.approx(mean, rel=0.35)


def test_variance_of_the_second_sketch_has_no_collisions_inside_a_layer():
    layers = [LayerShape("a", 3, 4), LayerShape("b", 2, 5)]
    values = gradients(2, layers)
    k = 12  # slots of a half: as many as the larger layer has numbers
    expected = 0.0
    (xa, ya), (xb, yb) = (values[name].flatten(1) for name in ("a", "b"))
    for p in range(len(xa)):
        for q in range(len(xb)):
            # e = x_p y_q + x_q y_p with probability 1/k
            expected += float((xa[p] * yb[q] + xb[q] * ya[p]) ** 2) / k
    found = measured("kronecker", layers, values, side=100, dim=2 * k)
    assert found == pytest.approx(expected / 2, rel=0.15), "slots are not distinct within a layer"
    one = layers[:1]
    alone = {"a": values["a"]}
    assert measured("kronecker", one, alone, seeds=20, side=100, dim=2 * k) < 1e-20


def test_variance_of_the_countsketch():
    """No two entries of one row or column meet, so it is below that of independent buckets."""
    layers = [LayerShape("a", 7, 8)]
    values = gradients(2, layers)
    x, y = flat(values)
    found = measured("countsketch", layers, values, side=2, dim=64)
    bound = sign_variance(x, y) / 64
    assert 0.4 * bound < found < 1.15 * bound, f"{found} against {bound}"
