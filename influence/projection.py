"""Seeded random projections that keep inner products: E<Px, Py> = <x, y>.

`Sketch` is for gradients of many layers: a two-sided (Kronecker) projection P_out' G P_in of each
layer, then a CountSketch (Charikar, Chen and Farach-Colton 2002; Weinberger et al.,
arXiv 0902.2206) of all blocks, twice with independent randomness. `countsketch` and
`rademacher_projection` are for plain vectors.

All randomness comes from the counter-based Philox generator with a key that is a blake2b hash of
the seed and of what the numbers are for, so it depends on no device, order or batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.errors import InputError

HALVES = 2
TILE_ROWS = 256


def _raw(count: int, *purpose: object) -> np.ndarray:
    key = blake2b("\x1f".join(map(str, purpose)).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    return generator.random_raw(count).astype("<u8", copy=False)


def _signs(shape: tuple[int, ...], *purpose: object) -> Tensor:
    """Independent signs, +1 or -1, as int8."""
    count = int(np.prod(shape))
    bits = np.unpackbits(_raw(-(-count // 64), *purpose).view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(bits.astype(np.int8) * 2 - 1).view(shape)


def _buckets(count: int, dim: int, *purpose: object) -> Int[Tensor, " count"]:
    return torch.from_numpy((_raw(count, *purpose) % np.uint64(dim)).astype(np.int64))


@dataclass(frozen=True)
class _LayerMap:
    """One layer's randomness; a side that is None is kept as it is (the identity)."""

    out_signs: Float[Tensor, "out halves_s"] | None
    in_signs: Float[Tensor, "in halves_r"] | None
    buckets: Int[Tensor, " halves_s_r"]
    factors: Float[Tensor, " halves_s_r"]


@dataclass(frozen=True)
class Sketch:
    """Two independent halves, each an unbiased sketch; vectors are [half A, half B] / sqrt(2).

    A half projects each layer with side/2 random directions a side (signs / sqrt(side/2)) and
    adds the blocks up in dim/2 buckets with random signs. So <v_i, v_j> is the mean of the two
    halves' estimates, and their difference shows the error. Make one with `make_sketch`.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device
    maps: dict[str, _LayerMap]

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that `apply_layer` and `project_gradient` add each layer's part to."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def apply_layer(
        self,
        name: str,
        x: Float[Tensor, "b t in"],
        d: Float[Tensor, "b t out"],
        accumulator: Float[Tensor, "b dim"],
    ) -> None:
        """Adds the sketch of D_i' X_i of one layer, without forming it."""
        layer = self.maps[name]
        right = _project_tokens(x.to(self.dtype), layer.in_signs)
        left = _project_tokens(d.to(self.dtype), layer.out_signs)
        self._scatter(layer, torch.matmul(left.mT, right), accumulator)

    def project_gradient(
        self, name: str, gradients: Float[Tensor, "n out in"], accumulator: Float[Tensor, "n dim"]
    ) -> None:
        """Adds the sketch of explicit gradients of one layer: the same map."""
        layer = self.maps[name]
        block = gradients.to(self.dtype).unsqueeze(1)
        if layer.in_signs is not None:
            block = torch.matmul(block, _by_half(layer.in_signs))
        if layer.out_signs is not None:
            block = torch.matmul(_by_half(layer.out_signs).mT, block)
        self._scatter(layer, block, accumulator)

    def _scatter(
        self,
        layer: _LayerMap,
        block: Float[Tensor, "b halves s r"],
        accumulator: Float[Tensor, "b dim"],
    ) -> None:
        rows = block.shape[0]
        flat = block.expand(-1, HALVES, -1, -1).reshape(rows, -1) * layer.factors
        accumulator.scatter_add_(1, layer.buckets.expand(rows, -1), flat)


def _by_half(signs: Float[Tensor, "d halves_s"]) -> Float[Tensor, "halves d s"]:
    return signs.view(signs.shape[0], HALVES, -1).transpose(0, 1)


def _project_tokens(
    x: Float[Tensor, "b t d"], signs: Float[Tensor, "d halves_s"] | None
) -> Float[Tensor, "b halves t s"]:
    if signs is None:
        return x.unsqueeze(1)
    return torch.matmul(x, signs).view(*x.shape[:2], HALVES, -1).transpose(1, 2)


def make_sketch(
    layers: Sequence[tuple[str, int, int]],
    *,
    side: int,
    dim: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Sketch:
    """The sketch of layers (name, out, in), to at most `dim` numbers a row.

    `side` directions a side of a layer and `dim` buckets, each shared by the two halves. A side
    of a layer of at most side/2 is kept exactly. Where all blocks of a half together have at most
    dim/2 numbers there is no CountSketch, and `Sketch.dim` is smaller than `dim`. A layer's
    randomness depends on its name, not on the other layers. Raises InputError for an odd or too
    small `side` or `dim`, or for a repeated layer name.
    """
    for key, value in (("side", side), ("dim", dim)):
        if value < HALVES or value % HALVES:
            raise InputError(
                f"gradients.{key}: expected an even number of at least {HALVES} (the sketch has "
                f"two independent halves), got {value}"
            )
    names = [name for name, _out, _in in layers]
    if len(set(names)) != len(names):
        raise InputError("layers: expected distinct layer names, got a name twice")
    directions = side // HALVES
    sizes = [min(out, directions) * min(in_, directions) for _name, out, in_ in layers]
    half_dim = min(dim // HALVES, sum(sizes))
    maps: dict[str, _LayerMap] = {}
    offset = 0
    for (name, out, in_), size in zip(layers, sizes, strict=True):
        sides = [
            _side_signs(out, directions, (seed, name, "out")),
            _side_signs(in_, directions, (seed, name, "in")),
        ]
        scale = HALVES**-0.5
        for signs in sides:
            scale *= 1.0 if signs is None else directions**-0.5
        if half_dim == sum(sizes):
            one = torch.arange(offset, offset + size)
            buckets, factors = (
                [one] * HALVES,
                [torch.full((size,), scale, dtype=torch.float64)] * HALVES,
            )
        else:
            buckets = [_buckets(size, half_dim, seed, name, "bucket", h) for h in range(HALVES)]
            factors = [
                _signs((size,), seed, name, "sign", h).double() * scale for h in range(HALVES)
            ]
        shifted = torch.cat([bucket + h * half_dim for h, bucket in enumerate(buckets)])
        kept = [None if signs is None else signs.to(device, dtype) for signs in sides]
        factor = torch.cat([part.to(dtype) for part in factors])
        maps[name] = _LayerMap(kept[0], kept[1], shifted.to(device), factor.to(device))
        offset += size
    return Sketch(HALVES * half_dim, dtype, torch.device(device), maps)


def _side_signs(width: int, directions: int, purpose: tuple[object, ...]) -> Tensor | None:
    if width <= directions:
        return None
    return torch.cat([_signs((width, directions), *purpose, h) for h in range(HALVES)], dim=1)


def half_products(v: Float[Tensor, "n dim"], w: Float[Tensor, "m dim"]) -> Float[Tensor, "2 n m"]:
    """The two halves' estimates of the inner products of sketched rows; their mean is V W'."""
    left = v.view(len(v), HALVES, -1).transpose(0, 1)
    right = w.view(len(w), HALVES, -1).transpose(0, 1)
    return HALVES * torch.matmul(left, right.mT)


def countsketch(x: Float[Tensor, "n d"], dim: int, seed: int) -> Float[Tensor, "n k"]:
    """CountSketch of each row to k = dim numbers; rows of at most `dim` numbers stay as they are.

    Each coordinate is added with a random sign to a random bucket (Weinberger et al.,
    arXiv 0902.2206), so inner products are kept on average.
    """
    width = x.shape[1]
    if width <= dim:
        return x
    buckets = _buckets(width, dim, seed, "countsketch", "bucket").to(x.device)
    signs = _signs((width,), seed, "countsketch", "sign").to(x)
    return x.new_zeros(len(x), dim).scatter_add_(1, buckets.expand(len(x), -1), x * signs)


def rademacher_projection(x: Float[Tensor, "n d"], dim: int, seed: int) -> Float[Tensor, "n k"]:
    """Product of each row with a d x dim matrix of signs / sqrt(dim), made tile by tile.

    Keeps inner products on average. Rows of at most `dim` numbers stay as they are (k = d).
    """
    width = x.shape[1]
    if width <= dim:
        return x
    total = x.new_zeros(len(x), dim)
    for tile, start in enumerate(range(0, width, TILE_ROWS)):
        part = x[:, start : start + TILE_ROWS]
        signs = _signs((part.shape[1], dim), seed, "rademacher", tile).to(x)
        total.addmm_(part, signs)
    return total.mul_(dim**-0.5)
