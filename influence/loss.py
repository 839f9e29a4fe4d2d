"""Per-sample losses of the response tokens, with logits at no other position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.errors import InputError

Reduction = Literal["mean", "sum", "sqrt"]
REDUCTIONS: tuple[str, ...] = ("mean", "sum", "sqrt")

IGNORED_LABEL = -100


class TokenBatch(Protocol):
    """What the model sees of a batch: right-padded ids, and labels that are -100 off the response.

    `labels[b, t]` is the token at t, predicted from the logits at t - 1.
    """

    @property
    def input_ids(self) -> Int[Tensor, "b t"]: ...

    @property
    def labels(self) -> Int[Tensor, "b t"]: ...


def sample_losses(
    logits: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    sample_index: Int[Tensor, " n"],
    batch_size: int,
    reduction: Reduction,
) -> Float[Tensor, " b"]:
    """Cross-entropy (nats) of each sample's response tokens, in float32 or higher.

    `logits[k]` predicts `labels[k]`, a response token of sample `sample_index[k]`. The token
    losses of a sample are averaged (`mean`), summed (`sum`), or summed and divided by the square
    root of their number (`sqrt`). Every sample needs a response token: a sample without one gets
    nan under `mean` and `sqrt`. Raises InputError for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise InputError(
            f"gradients.reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    token_losses = F.cross_entropy(wide, labels, reduction="none")
    sums = token_losses.new_zeros(batch_size).index_add(0, sample_index, token_losses)
    if reduction == "sum":
        return sums
    counts = token_losses.new_zeros(batch_size)
    counts = counts.index_add(0, sample_index, torch.ones_like(token_losses))
    return sums / (counts if reduction == "mean" else counts.sqrt())


def response_samples(batch: TokenBatch) -> Int[Tensor, " n"]:
    """The sample of every response token that a previous token predicts, in order."""
    return (batch.labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)[0]


def response_forward(
    model: nn.Module, batch: TokenBatch, call: Callable[..., Any] | None = None
) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Logits that predict a response token, those tokens, and the sample each belongs to.

    The hidden states that predict a response token are gathered just before the output head, so
    the (b, t, v) logits never exist, while softcapping or scaling behind the head still applies.
    No attention mask is passed: the batch is padded on the right and attention is causal, so no
    real token sees a padded one, and attention kernels without a mask stay usable. `call` is what
    to call in the model's place: its wrapper for training on several devices.

    Raises InputError if a row has no response token to predict, or if the model has no output
    head that is called once with (b, t, hidden).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise InputError(
            f"model.name: {type(model).__name__} has no output head; expected a causal LM"
        )
    device = next(model.parameters()).device
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    wanted = labels[:, 1:] != IGNORED_LABEL
    empty = (~wanted.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"batch rows {empty} have no response token that a previous token predicts; "
            "such rows get a reason and no score, so leave them out of the batch"
        )
    sample_index, position = wanted.nonzero(as_tuple=True)
    calls: list[tuple[int, ...]] = []

    def gather(_module: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        calls.append(tuple(hidden.shape))
        if tuple(hidden.shape[:2]) != tuple(input_ids.shape):
            return args
        return (hidden[sample_index, position].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        logits = (call or model)(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][:2] != tuple(input_ids.shape):
        raise InputError(
            f"model.name: the output head of {type(model).__name__} was called with shapes "
            f"{calls}, expected one call with {tuple(input_ids.shape)} tokens"
        )
    return logits[0], labels[:, 1:][wanted], sample_index
