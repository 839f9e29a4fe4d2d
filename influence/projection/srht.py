"""The subsampled randomised Hadamard transform of each layer's gradient.

Ailon and Chazelle 2009; Tropp, arXiv 1011.1595. A layer of N numbers is padded with zeros to the
next power of two P, multiplied by random signs and by the P x P Hadamard matrix H, of which a
random k rows are kept: y = S H D x / sqrt(k). Each row h of H D keeps inner products on average,
E (h'x)(h'y) = <x, y>, so that every layer keeps its share. The layers' signs are independent, and
their results are added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.projection.formed import FormedProjection
from influence.projection.halves import HALVES, LayerShape, check_distinct, check_even
from influence.projection.randomness import places, signs

_RADIX_BITS = 5


@dataclass(frozen=True)
class _LayerMap:
    """Packed signs of the N numbers, and the kept rows, by part and half."""

    signs: list[list[Tensor]]
    kept: list[list[Int[Tensor, " k"]]]
    padded: int


def _project(
    maps: Mapping[str, _LayerMap], dim: int, name: str, part: int, flat: Float[Tensor, "c n"]
) -> Float[Tensor, "c dim"]:
    layer, halves = maps[name], []
    for half in range(HALVES):
        padded = flat.new_zeros(len(flat), layer.padded)
        torch.mul(flat, layer.signs[part][half], out=padded[:, : flat.shape[1]])
        # 1 / sqrt(HALVES) as every projection's halves, 1 / sqrt(dim / HALVES) from the mean.
        halves.append(hadamard(padded)[:, layer.kept[part][half]] * dim**-0.5)
    return torch.cat(halves, dim=1)


def hadamard(x: Float[Tensor, "c p"]) -> Float[Tensor, "c p"]:
    """x H for the Hadamard matrix H of a power-of-two size (entries +1 and -1, Sylvester's order).

    H of size 2^k is the k-fold Kronecker product of [[1, 1], [1, -1]]: a few small products with
    matrices of up to 2^5 take its place.
    """
    rows, size = x.shape
    done = 1
    while done < size:
        radix = min(1 << _RADIX_BITS, size // done)
        block = x.view(rows, size // (done * radix), radix, done)
        x = torch.matmul(_sylvester(radix).to(x), block).reshape(rows, size)
        done *= radix
    return x


def _sylvester(size: int) -> Float[Tensor, "size size"]:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def make_srht(
    layers: Sequence[LayerShape],
    *,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FormedProjection:
    """The randomised Hadamard transform of these layers to `dim` numbers a row.

    A layer with fewer than dim/2 numbers is padded to the power of two above dim/2. Keeps one byte
    for every number of a layer and half (its sign). Raises InputError for an odd `dim` or a
    repeated layer name.
    """
    check_even(dim=dim)
    check_distinct(list(layers))
    k = dim // HALVES
    maps: dict[str, _LayerMap] = {}
    for layer in layers:
        count = layer.out * layer.in_
        padded = 1 << max(count - 1, k - 1, 0).bit_length()
        maps[layer.name] = _LayerMap(
            [
                [
                    signs((count,), seed, layer.name, "sign", p, half).to(device)
                    for half in range(HALVES)
                ]
                for p in range(layer.parts)
            ],
            [
                [
                    places(k, padded, seed, layer.name, "row", p, half).to(device)
                    for half in range(HALVES)
                ]
                for p in range(layer.parts)
            ],
            padded,
        )
    return FormedProjection(dim, dtype, torch.device(device), partial(_project, maps, dim))
