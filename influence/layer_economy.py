"""Which layers are enough: subsets whose influences rank the rows as those of all layers do.

In2Core (San Joaquin et al., arXiv 2408.03560) computes influences from a few layers, chosen by
their position, to save the memory that gradients take. A layer's part of an influence is additive,
so from a pilot's parts (rows x targets x layers) every subset can be judged: by the Spearman
correlation of its influences with the full ones, mean over targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from influence.datainf import LayerBlock

Parts = Float[np.ndarray, "n m groups"]

_CHUNK_ENTRIES = 1 << 24


class LayerGroup(NamedTuple):
    """Parameters that are kept or left out together, and what their gradients take of a row."""

    name: str
    layers: tuple[int, ...]
    bytes: int


class Choice(NamedTuple):
    """Some groups (by their numbers), how they were chosen, and how well they rank.

    spearman: on the rows that the choice was made on; held_out: on other rows.
    """

    rule: str
    groups: tuple[int, ...]
    bytes: int
    spearman: float
    held_out: float


def module_groups(blocks: Sequence[LayerBlock], number_bytes: int = 4) -> list[LayerGroup]:
    """The layers of one module (both factors of a LoRA) together, in the model's order."""
    members: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        module = block.name.split(".lora_")[0]
        if module == block.name:
            module = block.name.rpartition(".")[0] or block.name
        members.setdefault(module, []).append(index)
    return [
        LayerGroup(name, tuple(layers), number_bytes * sum(blocks[i].length for i in layers))
        for name, layers in members.items()
    ]


class Judge:
    """Spearman correlations of subsets' influences with the full ones, mean over the columns.

    Columns whose full influences are all the same have no ranking and do not count.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = np.ascontiguousarray(np.moveaxis(parts, 2, 0), dtype=np.float64)
        full = self._parts.sum(axis=0)
        self._varied = np.ptp(full, axis=0) > 0
        self._full = _standard_ranks(full[None])[0]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self._parts)

    def of(self, chosen: Sequence[int]) -> float:
        """Of one subset."""
        return float(self.with_each(chosen, [])[0])

    def with_each(self, chosen: Sequence[int], others: Sequence[int]) -> Float[np.ndarray, " k"]:
        """Of the subset with each of the others added; with none of them, of itself."""
        base = self._parts[list(chosen)].sum(axis=0)
        if not others:
            return self._correlations(base[None])
        step = max(1, _CHUNK_ENTRIES // base.size)
        found = [
            self._correlations(base + self._parts[list(others[start : start + step])])
            for start in range(0, len(others), step)
        ]
        return np.concatenate(found)

    def _correlations(self, scores: Float[np.ndarray, "k n m"]) -> Float[np.ndarray, " k"]:
        products = np.einsum("knm,nm->km", _standard_ranks(scores), self._full)
        return products[:, self._varied].mean(axis=1) if self._varied.any() else products[:, 0] * 0


def _standard_ranks(scores: Float[np.ndarray, "k n m"]) -> Float[np.ndarray, "k n m"]:
    """Ranks along n with mean 0 and length 1; equal scores by position."""
    n = scores.shape[1]
    ranks = np.empty(scores.shape)
    order = np.argsort(scores, axis=1, kind="stable")
    places = np.broadcast_to(np.arange(n, dtype=np.float64)[None, :, None], scores.shape)
    np.put_along_axis(ranks, order, places, axis=1)
    ranks -= (n - 1) / 2
    return ranks / max(1e-300, float(np.sqrt(np.sum((np.arange(n) - (n - 1) / 2) ** 2))))


def greedy(judge: Judge, groups: Sequence[LayerGroup], budget: float) -> list[tuple[int, ...]]:
    """Subsets of growing size within the budget (bytes): each adds the group that helps most."""
    chosen: list[int] = []
    spent, path = 0, []
    while True:
        left = [
            g for g in range(len(groups)) if g not in chosen and spent + groups[g].bytes <= budget
        ]
        if not left:
            return path
        best = left[int(np.argmax(judge.with_each(chosen, left)))]
        chosen.append(best)
        spent += groups[best].bytes
        path.append(tuple(sorted(chosen)))


def _spread(count: int, k: int) -> Int[np.ndarray, " k"]:
    return np.unique(np.round(np.linspace(0, count - 1, k)).astype(int))


#: The choices by position that the paper compares: k of the groups, in the model's order.
POSITIONS: dict[str, Callable[[int, int], np.ndarray]] = {
    "first": lambda count, k: np.arange(k),
    "last": lambda count, k: np.arange(count - k, count),
    "middle": lambda count, k: (count - k) // 2 + np.arange(k),
    "spread": _spread,
}


def by_position(rule: str, groups: Sequence[LayerGroup], budget: float) -> list[tuple[int, ...]]:
    """The rule's subsets of 1, 2, ... groups, as far as they are within the budget."""
    found = []
    for k in range(1, len(groups) + 1):
        chosen = tuple(POSITIONS[rule](len(groups), k).tolist())
        if sum(groups[g].bytes for g in chosen) <= budget:
            found.append(chosen)
    return found


class Economy(NamedTuple):
    """Every subset that was judged, by rule and in growing size, and the one to use."""

    choices: list[Choice]
    chosen: Choice


def economise(
    parts: Parts, groups: Sequence[LayerGroup], budget: float | None = None
) -> Economy | None:
    """The best subset within a budget of bytes a row (None: all layers may be kept).

    The greedy one and those by position are judged on every other row of the pilot and held
    against the rows between them. The best is the one that ranks the first rows best (of equal ones
    the smallest). None if no group is within the budget.
    """
    limit = sum(group.bytes for group in groups) if budget is None else budget
    judge, check = Judge(parts[::2]), Judge(parts[1::2])
    paths = {"greedy": greedy(judge, groups, limit)}
    paths |= {rule: by_position(rule, groups, limit) for rule in POSITIONS}
    choices = [
        Choice(
            rule,
            chosen,
            sum(groups[g].bytes for g in chosen),
            judge.of(chosen),
            check.of(chosen),
        )
        for rule, path in paths.items()
        for chosen in path
    ]
    if not choices:
        return None
    return Economy(choices, max(choices, key=lambda c: (round(c.spearman, 9), -c.bytes)))
