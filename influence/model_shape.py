"""The model's shape without its weights: parameter counts and coverage, from a meta-device copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from influence.adapters import local_adapter, peft_quiet
from influence.blocks import find_decoder
from influence.config import Config
from influence.errors import ModelLoadError
from influence.gradients import Layer, attributed_layers, coverage
from influence.model_building import BUILDING
from influence.replica import adapter_arguments, load_description


@dataclass(frozen=True)
class ModelShape:
    """Counts that costs follow from.

    Attributes:
        parameters: all parameters.
        block_weights: matrix parameters inside the decoder blocks that a token meets: of a stack
            of experts, those of the experts that it is sent to.
        head_weights: parameters of the output head.
        attributed: parameters whose gradients are taken.
        formed: the attributed ones inside the blocks that a token meets; forming a gradient takes
            one multiplication for each of them and token.
        head_attributed: those of the output head, if it is attributed.
        sides: sum over attributed matrices inside the blocks of (in + out) features.
        layers: number of attributed layers.
        outputs: what the matrices inside the blocks give a token, all together, in numbers.
        vocabulary: number of logits of a token.
        blocks: number of decoder blocks.
        hidden: width of the residual stream.
        feed_forward: those of `block_weights` that are in the blocks' child `mlp`.
        attention: width of all heads together, summed over the blocks.
        backward: the part of the blocks that a backward pass goes through: from the first one with
            an attributed parameter on, or all where one lies before them.
        sizes: parameters of every attributed layer, by its name.
        coverage: one row per group of parameters; shares sum to 1.
    """

    parameters: int
    block_weights: int
    head_weights: int
    attributed: int
    formed: int
    head_attributed: int
    sides: int
    layers: int
    outputs: int
    vocabulary: int
    blocks: int
    hidden: int
    feed_forward: int
    attention: int
    backward: float
    sizes: dict[str, int]
    coverage: list[dict[str, Any]]


def model_shape(config: Config) -> ModelShape:
    """Read the model's config, build it without weights, and count.

    Raises:
        ModelLoadError: the model's or the adapter's config cannot be read.
    """
    from transformers import AutoModelForCausalLM

    described = load_description(config.model)
    try:
        with BUILDING, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                described, trust_remote_code=config.model.trust_remote_code
            )
        model.tie_weights()
        if config.model.adapter is not None:
            from peft import PeftConfig, get_peft_model

            folder = local_adapter(config.model.adapter)
            adapter = PeftConfig.from_pretrained(folder, **adapter_arguments(config.model))
            with torch.device("meta"), peft_quiet():
                model = get_peft_model(model, adapter)
    except ModelLoadError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelLoadError(
            f"model.name: cannot build {config.model.name!r} from its config: "
            f"{type(error).__name__}: {first}"
        ) from error
    layers = attributed_layers(
        model,
        config.gradients.parameters,
        blocks=config.gradients.blocks,
        seed=config.seed,
        only=config.layer_patterns,
    )
    decoder = find_decoder(model)
    head = model.get_output_embeddings()
    share = _expert_share(described.get_text_config())
    inside = {id(p) for p in decoder.blocks.parameters()}
    met = [layer for layer in layers if id(layer.parameter) in inside]
    heads = set() if head is None else {id(p) for p in head.parameters()}
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        block_weights=_matrix_weights(decoder.blocks, share),
        head_weights=0 if head is None else sum(p.numel() for p in head.parameters()),
        attributed=sum(layer.out_features * layer.in_features for layer in layers),
        formed=sum(int(layer.size * share(layer.parameter)) for layer in met),
        head_attributed=sum(layer.size for layer in layers if id(layer.parameter) in heads),
        sides=sum(
            int((layer.shape.out + layer.in_features) * layer.parts * share(layer.parameter))
            for layer in met
        ),
        layers=len(layers),
        outputs=sum(
            int(layer.shape.out * layer.parts * share(layer.parameter))
            for layer in attributed_layers(model, "linear")
        ),
        vocabulary=described.get_text_config().vocab_size,
        blocks=len(decoder.blocks),
        hidden=described.get_text_config().hidden_size,
        feed_forward=sum(_matrix_weights(getattr(b, "mlp", None), share) for b in decoder.blocks),
        attention=len(decoder.blocks) * _heads_width(described.get_text_config()),
        backward=_backward_part(model, decoder.blocks, layers),
        sizes={layer.name: layer.size for layer in layers},
        coverage=[asdict(row) for row in coverage(model, layers)],
    )


def passes_shape(config: Config) -> ModelShape:
    """The model as a LoRA training meets it: a pass forward and back through all of it.

    Operations of the factors' own gradients are little beside those.
    """
    linear = config.gradients.model_copy(update={"parameters": "linear", "blocks": "all"})
    return model_shape(config.model_copy(update={"gradients": linear}))


def _matrix_weights(module: Any, share: Callable[[torch.Tensor], float]) -> int:
    """Matrix parameters that a token meets in a module; 0 for none."""
    parameters = () if module is None else module.parameters()
    return sum(int(p.numel() * share(p)) for p in parameters if p.dim() >= 2)


def _heads_width(described: Any) -> int:
    """Numbers that the queries of all heads of a block have together."""
    heads = getattr(described, "num_attention_heads", None)
    each = getattr(described, "head_dim", None)
    if isinstance(heads, int) and isinstance(each, int):
        return heads * each
    return described.hidden_size


def _backward_part(model: nn.Module, blocks: Any, layers: Sequence[Layer]) -> float:
    """See `ModelShape.backward`."""
    where = {id(p): index for index, block in enumerate(blocks) for p in block.parameters()}
    before = {id(m.weight): 0 for m in model.modules() if isinstance(m, nn.Embedding)}
    places = {**before, **where}
    found = [places[id(each.parameter)] for each in layers if id(each.parameter) in places]
    return (len(blocks) - min(found, default=len(blocks))) / len(blocks)


def _expert_share(described: Any) -> Callable[[torch.Tensor], float]:
    """What share of a stack of experts (a three-dimensional parameter) a token meets."""
    per_token = getattr(described, "num_experts_per_tok", None) or getattr(described, "top_k", None)

    def share(parameter: torch.Tensor) -> float:
        if parameter.dim() != 3 or not isinstance(per_token, int):
            return 1.0
        return min(1.0, per_token / parameter.shape[0])

    return share
