"""What share of a model's parameters the chosen layers cover, and why the rest is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from influence.blocks import find_decoder
from influence.gradients.layers import Layer
from influence.gradients.parameters import has_gradient, is_adapter


@dataclass(frozen=True)
class CoverageRow:
    """One group of parameters; the shares of all rows sum to 1."""

    group: str
    parameters: int
    share: float
    rule: str | None
    attributed: bool
    reason: str | None


def coverage(model: nn.Module, layers: Sequence[Layer]) -> list[CoverageRow]:
    """Every parameter of `model` (each counted once), grouped, attributed ones first.

    `parameters` is a count, `share` its part of all parameters. A group that is not attributed
    carries the reason.
    """
    attributed = {id(layer.parameter): layer for layer in layers}
    groups = _Groups(model)
    lora = any(is_adapter(layer.name) for layer in layers)
    counts: dict[tuple[str, str | None, str | None], int] = {}
    for name, parameter in model.named_parameters():
        layer = attributed.get(id(parameter))
        group = groups.of(name, parameter)
        if layer is not None:
            key: tuple[str, str | None, str | None] = (group, layer.rule, None)
        else:
            key = (group, None, _reason(name, parameter, lora))
        counts[key] = counts.get(key, 0) + parameter.numel()
    total = sum(counts.values())
    rows = [
        CoverageRow(group, count, count / total, rule, rule is not None, reason)
        for (group, rule, reason), count in counts.items()
    ]
    return sorted(rows, key=lambda row: (not row.attributed, -row.parameters, row.group))


def _reason(name: str, parameter: nn.Parameter, lora: bool) -> str:
    if not has_gradient(parameter):
        return "quantised: it has no gradient"
    if is_adapter(name):
        return "a parameter of the adapter: choose gradients.parameters: lora"
    if "modules_to_save" in name or "trainable_tokens" in name:
        return "trained with the adapter, but no factor of it: choose it by name"
    if lora:
        return "frozen: only the adapter is attributed"
    return "not among the chosen parameters"


class _Groups:
    """Names of the groups that the table shows."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside = {
            id(parameter)
            for block in find_decoder(model).blocks
            for parameter in block.parameters()
        }
        self._heads = _ids(model, "get_output_embeddings")
        self._embeddings = _ids(model, "get_input_embeddings")

    def of(self, name: str, parameter: nn.Parameter) -> str:
        owner = self._model.get_submodule(name.rpartition(".")[0])
        parts = name.split(".")
        if any(part.startswith("lora_magnitude") for part in parts):
            return "DoRA magnitudes"
        if is_adapter(name):
            return "LoRA factors"
        if id(parameter) in self._embeddings:
            tied = id(parameter) in self._heads
            return "embeddings, tied with the output head" if tied else "embeddings"
        if id(parameter) in self._heads and parameter.ndim == 2:
            return "output head"
        if parts[-1] == "bias" or parts[-1].endswith("_bias"):
            return "biases"
        if "norm" in type(owner).__name__.lower() or "norm" in name.lower():
            return "norms"
        if isinstance(owner, nn.Embedding):
            return "position embeddings"
        if parameter.ndim == 3:
            return "expert tensors"
        if parameter.ndim == 2:
            within = id(parameter) in self._inside
            return "linear weights of the blocks" if within else "linear weights outside the blocks"
        return f"others ({type(owner).__name__}.{parts[-1]})"


def _ids(model: nn.Module, getter: str) -> set[int]:
    found = cast("nn.Module | None", getattr(model, getter)())
    return set() if found is None else {id(parameter) for parameter in found.parameters()}
