"""LoRA fine-tuning that judges a choice of rows: one frozen model, an adapter that is reset."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from influence.batching import Batch, make_batches
from influence.config import ModelConfig
from influence.loss import response_forward, sample_losses
from influence.replica import load_replica, load_tokenizer
from influence.tokenization import Encoded, Encoder, make_encoder

PROGRESS_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """How every selection is trained on; `warmup` is a share of the steps."""

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 5e-4
    epochs: int = 2
    batch_size: int = 8
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    token_budget: int = 1024


@dataclass(frozen=True)
class Judge:
    """The model with one LoRA adapter on every linear layer but the output head."""

    model: nn.Module
    encode: Encoder
    device: torch.device

    def reset(self, seed: int) -> None:
        """Fresh LoRA factors: A from the seed (Kaiming uniform), B zero, so no change at first."""
        torch.manual_seed(seed)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for name in module.lora_A:
                    module.reset_lora_parameters(name, True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The LoRA factors: all that is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


def load_judge(config: ModelConfig, recipe: Recipe, max_length: int) -> Judge:
    """Load the base once, in float32, and put the adapter on it."""
    replica = load_replica(config, "float32", config.device)
    encode = make_encoder(load_tokenizer(config), max_length)
    return Judge(add_adapter(replica.model, recipe), encode, replica.device)


def add_adapter(model: Any, recipe: Recipe) -> nn.Module:
    """The model with LoRA factors in its linear layers; everything else is frozen."""
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(model, lora)
    wrapped.eval()  # no dropout anywhere: what differs between runs is the rows and the seed
    # The inner model has get_output_embeddings; its linear layers carry the adapter.
    return wrapped.get_base_model()


def learning_rates(steps: int, peak: float, warmup: float) -> Float[np.ndarray, " steps"]:
    """Linear warm-up over ceil(warmup steps) steps to the peak, then linear decay towards 0.

    Step s (from 0) of w warm-up steps has peak (s + 1) / w, later ones
    peak (steps - s) / (steps - w + 1), so that no step has a rate of 0.
    """
    rising = min(steps, int(np.ceil(warmup * steps)))
    s = np.arange(steps)
    up = (s + 1) / max(1, rising)
    down = (steps - s) / (steps - rising + 1)
    return peak * np.where(s < rising, up, down)


def train(
    judge: Judge,
    encoded: Sequence[Encoded],
    weights: Float[np.ndarray, " n"],
    recipe: Recipe,
    seed: int,
) -> dict[str, Any]:
    """Minimise the weighted mean of the rows' mean response losses (nats per token) with AdamW.

    Rows without a response are left out (the caller counts them). Returns the mean loss of each
    epoch, tokens and seconds.
    """
    usable = [i for i, row in enumerate(encoded) if row.reason is None]
    steps = recipe.epochs * -(-len(usable) // recipe.batch_size)
    rates = learning_rates(steps, recipe.learning_rate, recipe.warmup)
    optimizer = torch.optim.AdamW(judge.parameters, lr=recipe.learning_rate, weight_decay=0.0)
    generator = np.random.default_rng([seed, 0x0DE4])
    start = said = time.monotonic()
    epoch_losses, tokens, step = [], 0, 0
    for _epoch in range(recipe.epochs):
        order, total = generator.permutation(usable), 0.0
        for first in range(0, len(order), recipe.batch_size):
            chosen = [int(i) for i in order[first : first + recipe.batch_size]]
            for group in optimizer.param_groups:
                group["lr"] = float(rates[step])
            rows = [encoded[i] for i in chosen]
            total += _step(judge, optimizer, rows, weights[chosen], recipe)
            tokens += sum(row.n_tokens for row in rows)
            step += 1
            now = time.monotonic()
            if now - said > PROGRESS_SECONDS:
                said = now
                speed = tokens / (now - start)
                print(f"  step {step} of {steps}, {speed:.0f} tokens/s", flush=True)
        epoch_losses.append(total / len(order))
    seconds = time.monotonic() - start
    return {"epoch_losses": epoch_losses, "tokens": tokens, "steps": steps, "seconds": seconds}


def _step(
    judge: Judge,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Encoded],
    weights: Float[np.ndarray, " b"],
    recipe: Recipe,
) -> float:
    """One optimiser step on (1/b) sum w_i l_i, in micro-batches; returns the sum of the l_i."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in make_batches(rows, recipe.token_budget):
        losses = _losses(judge, batch)
        share = torch.as_tensor(weights[batch.positions] / len(rows)).to(losses)
        (losses * share).sum().backward()
        total += float(losses.detach().sum())
    nn.utils.clip_grad_norm_(judge.parameters, recipe.max_grad_norm)
    optimizer.step()
    return total


def row_losses(judge: Judge, encoded: Sequence[Encoded], token_budget: int) -> list[float]:
    """Mean response loss (nats per token) of every row, in the order given."""
    found = [float("nan")] * len(encoded)
    with torch.no_grad():
        for batch in make_batches(encoded, token_budget):
            losses = _losses(judge, batch).tolist()
            for position, loss in zip(batch.positions, losses, strict=True):
                found[position] = loss
    return found


def _losses(judge: Judge, batch: Batch) -> Float[Tensor, " b"]:
    logits, labels, sample_index = response_forward(judge.model, batch.to(judge.device))
    return sample_losses(logits, labels, sample_index, len(batch.positions), "mean")
