"""In2Core's reference model: which adapter the gradients are taken with."""

from __future__ import annotations

from influence.config import Config
from influence.errors import InputError


def with_reference(config: Config) -> Config:
    """The config with its reference model's adapter as `model.adapter`; others as they are.

    Called once per job, before its model is looked at.

    Raises:
        InputError: see `reference_adapter`.
    """
    if config.method != "in2core":
        return config
    if config.model.adapter is None and config.gradients.parameters != "lora":
        return config  # gradients of the model's own weights: it is the reference
    adapter = reference_adapter(config)
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": adapter})})


def reference_adapter(config: Config) -> str:
    """The folder (or hub name) of the reference model's LoRA adapter.

    Raises:
        InputError: the config names none.
    """
    adapter = config.reference.adapter or config.model.adapter
    if adapter is None:
        raise InputError(
            "reference.adapter: method: in2core takes the gradients of LoRA factors that were "
            "fine-tuned on the pool; name the folder of such an adapter (PEFT) in "
            "reference.adapter or model.adapter"
        )
    return adapter
