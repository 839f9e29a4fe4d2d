"""Length-bucketed, token-budgeted batches of encoded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from influence.tokenization import Encoded

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the right.

    `labels` repeat `input_ids` where a token belongs to the response and are -100 elsewhere; they
    are not shifted. `positions` index the list that the batch was made from.
    """

    positions: list[int]
    input_ids: Int64[Tensor, "b t"]
    labels: Int64[Tensor, "b t"]
    lengths: Int64[Tensor, " b"]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.positions,
            self.input_ids.to(device),
            self.labels.to(device),
            self.lengths.to(device),
        )


def make_batches(encoded: Sequence[Encoded], token_budget: int, pad_id: int = 0) -> list[Batch]:
    """Group the rows that can be scored, longest first, so that rows x longest <= `token_budget`.

    Longest first, so that a device too small for the budget shows it in the first batch. A row
    longer than the budget is a batch of its own. The grouping depends on the list alone; ties in
    length keep the list's order.

    Raises:
        ValueError: `token_budget` is not positive.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    scorable = [i for i, row in enumerate(encoded) if row.reason is None]
    ordered = sorted(scorable, key=lambda i: (-len(encoded[i].input_ids), i))
    groups: list[list[int]] = []
    for position in ordered:
        longest = len(encoded[groups[-1][0]].input_ids) if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return [_pad(encoded, group, pad_id) for group in groups]


def _pad(encoded: Sequence[Encoded], positions: list[int], pad_id: int) -> Batch:
    lengths = [len(encoded[i].input_ids) for i in positions]
    input_ids = torch.full((len(positions), max(lengths)), pad_id, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        ids = torch.as_tensor(encoded[position].input_ids, dtype=torch.int64)
        response = torch.as_tensor(encoded[position].response_mask, dtype=torch.bool)
        input_ids[row, :length] = ids
        labels[row, :length] = torch.where(response, ids, IGNORED)
    return Batch(positions, input_ids, labels, torch.tensor(lengths, dtype=torch.int64))
