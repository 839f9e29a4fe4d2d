"""Random numbers of projections, from the counter-based Philox generator.

The key is a blake2b hash of the seed and of what the numbers are for, so that they depend on no
device, order or batch.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def raw(count: int, *purpose: object) -> np.ndarray:
    """`count` random 64-bit numbers."""
    key = blake2b("\x1f".join(map(str, purpose)).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    return generator.random_raw(count).astype("<u8", copy=False)


def signs(shape: tuple[int, ...], *purpose: object) -> Tensor:
    """Independent signs, +1 or -1, as int8."""
    count = int(np.prod(shape))
    words = raw(-(-count // 64), *purpose)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(bits.astype(np.int8) * 2 - 1).view(shape)


def places(count: int, slots: int, *purpose: object) -> Int[Tensor, " count"]:
    """Random slots, all distinct within each run of `slots` numbers.

    With count <= slots a uniformly random injection, otherwise one random permutation after the
    other: numbers that share a run never meet, and no sum of them depends on an order.
    """
    found = []
    for run, start in enumerate(range(0, count, slots)):
        size = min(slots, count - start)
        # Ties of 64-bit keys are settled by position: the same everywhere.
        order = np.argsort(raw(slots, *purpose, run), kind="stable")
        found.append(order[:size])
    return torch.from_numpy(np.concatenate(found).astype(np.int64))
