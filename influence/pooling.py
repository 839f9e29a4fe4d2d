"""Embeddings by pooling hidden states: the last token's, and RDS+."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.blocks import check_count, check_lengths, eval_mode, find_decoder, run_blocks_last
from influence.jvp import Embed


def make_hidden_embedder(model: nn.Module, *, blocks: int) -> Embed:
    """A function of (token ids padded on the right, lengths): the last token's hidden state.

    Row i is the hidden state of sample i's last real token after the first `blocks` blocks and the
    model's final norm: hidden_size numbers, float64 for a float64 model and float32 otherwise.

    Raises InputError for a model without decoder blocks or a `blocks` it does not have.
    """
    decoder = find_decoder(model)
    check_count(decoder, blocks)

    def embed(
        input_ids: Int[Tensor, "batch tokens"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch hidden"]:
        check_lengths(input_ids, lengths)
        with torch.no_grad():
            hidden = run_blocks_last(model, decoder, input_ids, lengths, blocks, through_norm=True)
        return hidden if hidden.dtype == torch.float64 else hidden.float()

    return embed


def make_rds_embedder(model: nn.Module) -> Embed:
    """A function of (token ids padded on the right, lengths): RDS+ (Ivison et al., 2503.01807).

    Row i is the mean of sample i's last hidden states (after the final norm) over its real tokens
    t = 1..T, weighted by t / (1 + ... + T): hidden_size numbers, float64 for a float64 model and
    float32 otherwise. Raises InputError for a model without decoder blocks.
    """
    decoder = find_decoder(model)

    def embed(
        input_ids: Int[Tensor, "batch tokens"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch hidden"]:
        check_lengths(input_ids, lengths)
        with torch.no_grad(), eval_mode(model):
            hidden = decoder.base(input_ids=input_ids, use_cache=False).last_hidden_state
        return position_weighted_mean(hidden, lengths)

    return embed


def position_weighted_mean(
    hidden: Float[Tensor, "batch tokens hidden"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch hidden"]:
    """sum_t t h_t / sum_t t over each row's first `lengths` tokens (arXiv 2503.01807, RDS+).

    Summed in float32 at least.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    count = lengths.to(hidden.device).unsqueeze(1)
    weight = torch.where(position <= count, position, 0).to(dtype)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return torch.einsum("bt,bth->bh", weight, hidden.to(dtype))
