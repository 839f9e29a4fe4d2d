"""The model's shape without its weights: parameter counts and coverage, from a meta-device copy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from influence.blocks import find_decoder
from influence.config import Config
from influence.errors import ModelLoadError
from influence.gradients import Parameters, attributed_layers, coverage
from influence.replica import adapter_arguments, load_description


@dataclass(frozen=True)
class ModelShape:
    """Counts that costs follow from.

    Attributes:
        parameters: all parameters.
        block_weights: matrix parameters inside the decoder blocks.
        head_weights: parameters of the output head.
        attributed: parameters whose gradients are taken.
        sides: sum over attributed layers of (in + out) features.
        blocks: number of decoder blocks.
        hidden: width of the residual stream.
        coverage: one row per group of parameters; shares sum to 1.
    """

    parameters: int
    block_weights: int
    head_weights: int
    attributed: int
    sides: int
    blocks: int
    hidden: int
    coverage: list[dict[str, Any]]


def model_shape(config: Config) -> ModelShape:
    """Read the model's config, build it without weights, and count.

    Raises:
        ModelLoadError: the model's or the adapter's config cannot be read.
    """
    from transformers import AutoModelForCausalLM

    described = load_description(config.model)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                described, trust_remote_code=config.model.trust_remote_code
            )
        model.tie_weights()
        if config.model.adapter is not None:
            from peft import PeftConfig, get_peft_model

            adapter = PeftConfig.from_pretrained(
                config.model.adapter, **adapter_arguments(config.model)
            )
            with torch.device("meta"):
                model = get_peft_model(model, adapter)
    except ModelLoadError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelLoadError(
            f"model.name: cannot build {config.model.name!r} from its config: "
            f"{type(error).__name__}: {first}"
        ) from error
    layers = attributed_layers(model, cast(Parameters, config.gradients.parameters))
    decoder = find_decoder(model)
    head = model.get_output_embeddings()
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        block_weights=sum(p.numel() for p in decoder.blocks.parameters() if p.dim() >= 2),
        head_weights=0 if head is None else sum(p.numel() for p in head.parameters()),
        attributed=sum(layer.out_features * layer.in_features for layer in layers),
        sides=sum(layer.out_features + layer.in_features for layer in layers),
        blocks=len(decoder.blocks),
        hidden=described.get_text_config().hidden_size,
        coverage=[asdict(row) for row in coverage(model, layers)],
    )
