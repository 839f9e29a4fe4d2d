"""A LoRA adapter of the shape that a fine-tuning would give it, with random numbers in it.

Plans, speeds and precisions go by shapes; no weight of the model is loaded for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from influence.adapters import local_adapter, peft_quiet
from influence.checkpoints import ADAPTER_FILES, OPTIMIZER_FILE
from influence.config import Config
from influence.errors import InputError, ModelLoadError
from influence.finetune import lora_config
from influence.finetune_job import settings_of, start_of
from influence.model_building import BUILDING
from influence.replica import adapter_arguments, load_description

_SCALE = 0.01


def write_blank(training: Config, folder: str, *, optimizer: bool = False, seed: int = 0) -> None:
    """Write what the config's fine-tuning would give, untrained, into a folder.

    optimizer: also AdamW's state, by names, as after one step. seed: of the numbers.

    Raises:
        InputError: finetune.target_modules that the model does not have.
        ModelLoadError: the model's or the adapter's config cannot be read.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    start = start_of(training)
    described = load_description(training.model)
    with BUILDING, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            described, trust_remote_code=training.model.trust_remote_code
        )
    model.tie_weights()
    if start.adapter is None:
        config: Any = lora_config(settings_of(training))
    else:
        try:
            place = local_adapter(start.adapter)
            config = PeftConfig.from_pretrained(place, **adapter_arguments(start))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"model.adapter: {start.adapter!r}: {error}") from error
    try:
        with peft_quiet(), torch.device("meta"):
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"finetune.target_modules: {error}") from error
    draw = torch.Generator().manual_seed(seed)
    shapes = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    numbers = {
        name: _SCALE * torch.randn(value.shape, generator=draw) for name, value in shapes.items()
    }
    wrapped.peft_config["default"].save_pretrained(folder)
    save_file(numbers, os.path.join(folder, ADAPTER_FILES[1]))
    if optimizer:
        trained = {n: tuple(p.shape) for n, p in wrapped.named_parameters() if p.requires_grad}
        torch.save(_blank_state(trained, draw), os.path.join(folder, OPTIMIZER_FILE))


def _blank_state(shapes: Mapping[str, tuple[int, ...]], draw: torch.Generator) -> dict[str, Any]:
    """The state dict of an AdamW that was made from named parameters of these shapes."""
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    adamw = torch.optim.AdamW(parameters.items())
    for parameter in parameters.values():
        parameter.grad = _SCALE * torch.randn(parameter.shape, generator=draw)
    adamw.step()
    return adamw.state_dict()
