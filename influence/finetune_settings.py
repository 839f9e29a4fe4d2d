"""How a model is fine-tuned: plain values, without the data, the model and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from influence.errors import InputError
from influence.finetune_steps import SCHEDULES
from influence.loss import REDUCTIONS, Reduction

#: What changes no more than the rounding of a result, and may so be changed under way.
FREE = ("token_budget", "save_every", "keep_checkpoints", "gradient_checkpointing", "keep_epochs")


@dataclass(frozen=True)
class FinetuneSettings:
    """LoRA and AdamW (betas 0.9 and 0.999, eps 1e-8) on the weighted mean of the rows' losses.

    target_modules: as in PEFT. epochs: may be broken. warmup_ratio: part of the steps in which the
    rate rises to `learning_rate`; `schedule`: linear, cosine or constant from there. batch_size:
    rows of an optimiser step, of all workers together. token_budget: tokens of a micro-batch,
    padding included. reduction: of a row's token losses. evaluate_every, save_every: steps, None
    for every epoch; the last step always counts. keep_checkpoints: how many of the newest stay
    when training is done, None for all. keep_epochs: whether what there is after each epoch
    stays, too (see `influence.checkpoints.epoch_folder`).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    epochs: float = 2.0
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 16
    token_budget: int = 4096
    reduction: Reduction = "mean"
    evaluate_every: int | None = None
    save_every: int | None = 100
    keep_checkpoints: int | None = 0
    gradient_checkpointing: bool = False
    keep_epochs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"finetune.{name}: expected one of {', '.join(known)}, "
                    f"not {getattr(self, name)!r}"
                )

    def values(self) -> dict[str, Any]:
        """All of them, ready for JSON."""
        modules = self.target_modules
        return {
            **asdict(self),
            "target_modules": modules if isinstance(modules, str) else list(modules),
        }

    def that_count(self) -> dict[str, Any]:
        """Those that a training which goes on must have in common with the one that began."""
        return {key: value for key, value in self.values().items() if key not in FREE}
