"""Loss and perplexity of a model on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from influence.batching import make_batches
from influence.loss import response_forward, sample_losses
from influence.tokenization import Encoded


@dataclass(frozen=True)
class SetLoss:
    """What a model makes of a set of rows, in nats per response token.

    loss: mean over the rows of each row's mean, so that short responses count as much as long ones.
    token_loss: mean over all response tokens; perplexity: its exponential, infinite beyond 1e300.
    """

    loss: float
    token_loss: float
    rows: int
    response_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.token_loss) if self.token_loss < 690 else math.inf


def row_losses(model: Any, encoded: Sequence[Encoded], token_budget: int) -> list[float]:
    """Mean response loss (nats per token) of every row, in the order given; nan if it has none.

    The model is to be in evaluation mode, and stays as it is.
    """
    found = [float("nan")] * len(encoded)
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in make_batches(encoded, token_budget):
            logits, labels, sample_index = response_forward(model, batch.to(device))
            losses = sample_losses(logits, labels, sample_index, len(batch.positions), "mean")
            for position, loss in zip(batch.positions, losses.tolist(), strict=True):
                found[position] = loss
    return found


def set_loss(encoded: Sequence[Encoded], losses: Sequence[float]) -> SetLoss:
    """The figures of a set out of its rows' mean losses."""
    tokens = [row.n_response_tokens for row in encoded]
    total = math.fsum(loss * n for loss, n in zip(losses, tokens, strict=True))
    return SetLoss(math.fsum(losses) / len(losses), total / sum(tokens), len(losses), sum(tokens))
