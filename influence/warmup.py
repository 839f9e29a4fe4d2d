"""The warm-up: fine-tuning on a small random part of the pool, before any gradient is taken.

Gradients at the very start of training say little of what training will do, and Adam's step has no
moments there; so the adapter and the optimiser's state of a short training come first (LESS, Xia et
al., arXiv 2402.04333, section 4.1; Influence Distillation, arXiv 2505.19051). The job makes it and
keeps it in the cache for every run that asks for the same (see `influence.own_training`).
"""

from __future__ import annotations

from influence.checkpoints import RESULT_FILES
from influence.config import Config
from influence.config_finetune import FinetuneConfig
from influence.reference import with_adapter
from influence.training_kind import TrainingKind


def with_warmup(config: Config, folder: str) -> Config:
    """The config with a warm-up's adapter in the model and, for AdamW, its state in the optimiser.

    A state that the config itself names stays.
    """
    config = with_adapter(config, folder)
    if config.optimizer.kind != "adamw" or config.optimizer.state is not None:
        return config
    optimizer = config.optimizer.model_copy(update={"state": folder})
    return config.model_copy(update={"optimizer": optimizer})


def _section(config: Config) -> FinetuneConfig | None:
    return config.warmup


WARMUP = TrainingKind(
    stage="warmup",
    key="warmup",
    what="the warm-up",
    files=RESULT_FILES,
    section=_section,
    apply=with_warmup,
)
