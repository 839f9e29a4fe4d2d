"""In2Core's reference model: which adapter the gradients are taken with.

It is named (`reference.adapter`, `model.adapter`), or the job makes it (`reference.finetune`): LoRA
fine-tuning on the pool, kept in the cache for every run that asks for the same (see
`influence.own_training`).
"""

from __future__ import annotations

from influence.checkpoints import ADAPTER_FILES
from influence.config import Config
from influence.config_finetune import FinetuneConfig
from influence.errors import InputError
from influence.methods import METHODS
from influence.training_kind import TrainingKind


def with_reference(config: Config) -> Config:
    """The config with the adapter that it names for its reference model as `model.adapter`.

    One whose reference the job makes is left as it is; see `influence.own_training`. Called once
    per job, before its model is looked at.

    Raises:
        InputError: see `reference_adapter`.
    """
    named = config.reference.adapter or config.model.adapter
    if not METHODS[config.method].reference_model or config.reference.finetune is not None:
        return config
    if named is None and config.gradients.parameters != "lora":
        return config  # gradients of the model's own weights: it is the reference
    model = config.model.model_copy(update={"adapter": reference_adapter(config)})
    return config.model_copy(update={"model": model})


def reference_adapter(config: Config) -> str:
    """The folder, URL or hub name of the reference model's LoRA adapter.

    Raises:
        InputError: the config names none.
    """
    adapter = config.reference.adapter or config.model.adapter
    if adapter is None:
        raise InputError(
            "reference.adapter: method: in2core takes the gradients of LoRA factors that were "
            "fine-tuned on the pool, and so do evaluations of its influences; name the folder of "
            "such an adapter (PEFT) in model.adapter, or, with method: in2core, in "
            "reference.adapter, or let the job make it: reference.finetune: {}"
        )
    return adapter


def with_adapter(config: Config, adapter: str) -> Config:
    """The config with this adapter in the model."""
    model = config.model.model_copy(update={"adapter": adapter, "adapter_revision": None})
    return config.model_copy(update={"model": model})


def _section(config: Config) -> FinetuneConfig | None:
    return config.reference.finetune if METHODS[config.method].reference_model else None


REFERENCE = TrainingKind(
    stage="reference",
    key="reference.finetune",
    what="the reference model",
    files=ADAPTER_FILES,
    section=_section,
    apply=with_adapter,
)
