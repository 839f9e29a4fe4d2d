"""LoRA fine-tuning that judges a choice of rows: one model, a fresh adapter for every choice."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from influence.config import ModelConfig
from influence.finetune import adapted, finetune
from influence.finetune_settings import FinetuneSettings
from influence.held_out import row_losses
from influence.replica import load_replica, load_tokenizer
from influence.tokenization import Encoded, Encoder, make_encoder
from influence.training_data import TrainingRows
from influence.training_progress import TrainingProgress
from influence.training_record import TrainingRecord

Losses = dict[str, list[float]]


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

    def settings(self, seed: int) -> FinetuneSettings:
        """Linear decay, no weight decay, no checkpoint but the last."""
        return FinetuneSettings(
            rank=self.rank,
            alpha=self.alpha,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            warmup_ratio=self.warmup,
            max_grad_norm=self.max_grad_norm,
            token_budget=self.token_budget,
            save_every=10**9,
            seed=seed,
        )


@dataclass(frozen=True)
class Judge:
    """The model without an adapter, and what makes tokens of rows for it."""

    model: Any
    encode: Encoder


def load_judge(config: ModelConfig, max_length: int) -> Judge:
    """Load the model once, in float32."""
    replica = load_replica(config, "float32", config.device)
    return Judge(replica.model, make_encoder(load_tokenizer(config), max_length))


def losses_of(
    judge: Judge, tests: Mapping[str, Sequence[Encoded]], recipe: Recipe
) -> tuple[Losses, float]:
    """(Mean response loss of every row of the tests by the model as it is, seconds)."""
    start, budget = time.monotonic(), recipe.token_budget
    losses = {name: row_losses(judge.model, rows, budget) for name, rows in tests.items()}
    return losses, time.monotonic() - start


def losses_with(
    judge: Judge, folder: str, recipe: Recipe, tests: Mapping[str, Sequence[Encoded]]
) -> tuple[Losses, float]:
    """What `losses_of` returns, with an adapter (a folder or s3://...)."""
    with adapted(judge.model, recipe.settings(0), folder):
        judge.model.eval()
        return losses_of(judge, tests, recipe)


def train_and_test(
    judge: Judge,
    encoded: Sequence[Encoded],
    weights: Float[np.ndarray, " n"],
    recipe: Recipe,
    seed: int,
    tests: Mapping[str, Sequence[Encoded]],
) -> tuple[dict[str, Any], tuple[Losses, float]]:
    """Train a fresh adapter on the rows, then take the tests' losses with it.

    Rows without a response are left out and counted. Returns counts, the mean weighted loss of each
    epoch, tokens, steps and seconds; and what `losses_of` returns.
    """
    settings = recipe.settings(seed)
    with tempfile.TemporaryDirectory() as folder:
        rows = TrainingRows.of(encoded, weights)
        record = finetune(judge.model, rows, {}, settings, folder, watcher=TrainingProgress())
        tested = losses_with(judge, folder, recipe, tests)
    trained = {
        "rows": record.rows.trained,
        "dropped": sum(record.rows.left_out.values()),
        "truncated": record.rows.truncated,
        "epoch_losses": epoch_losses(record, recipe.batch_size),
        "tokens": record.tokens,
        "steps": record.total_steps,
        "seconds": record.seconds,
    }
    return trained, tested


def epoch_losses(record: TrainingRecord, batch_size: int) -> list[float]:
    """The mean over the rows of each epoch out of the steps' means."""
    per_epoch, count = record.epoch_steps, record.rows.trained
    sizes = [batch_size] * (per_epoch - 1) + [count - batch_size * (per_epoch - 1)]
    losses = [step.loss for step in record.steps]
    return [
        float(np.average(losses[first : first + per_epoch], weights=sizes))
        for first in range(0, len(losses), per_epoch)
    ]
