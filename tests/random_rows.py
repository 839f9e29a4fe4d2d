"""Random rows as tokens, and the loss of one of them from full logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_models import VOCAB

from influence.tokenization import Encoded


def encoded(lengths: tuple[int, ...], seed: int = 0) -> list[Encoded]:
    """Random rows whose last half is the response."""
    generator = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = generator.integers(3, VOCAB, length).astype(np.int32)
        mask = np.arange(length) >= length // 2
        rows.append(
            Encoded(i, f"r{i}", None, None, b"", ids, mask, length, int(mask.sum()), False, None)
        )
    return rows


def row_loss(model: Any, row: Encoded) -> torch.Tensor:
    """Mean response loss of one row alone, from full logits."""
    ids = torch.as_tensor(row.input_ids, dtype=torch.int64)
    logits = model(input_ids=ids[None]).logits[0]
    token_losses = [
        -torch.log_softmax(logits[t - 1], dim=0)[ids[t]]
        for t in range(1, len(ids))
        if row.response_mask[t]
    ]
    return torch.stack(token_losses).mean()
