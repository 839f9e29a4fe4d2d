"""What share of a model's parameters the chosen layers cover, and why the rest is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from influence.blocks import find_decoder
from influence.gradients.layers import RULES, Layer, is_lora_factor


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
    attributed = {id(layer.rule.weight(layer.module)): layer for layer in layers}
    lora = any(is_lora_factor(layer.name) for layer in layers)
    inside = {
        id(parameter) for block in find_decoder(model).blocks for parameter in block.parameters()
    }
    heads = _ids(model, "get_output_embeddings")
    embeddings = _ids(model, "get_input_embeddings")
    counts: dict[tuple[str, str | None, str | None], int] = {}
    for name, parameter in model.named_parameters():
        layer = attributed.get(id(parameter))
        if layer is not None:
            group = "LoRA factors" if is_lora_factor(layer.name) else "linear weights of the blocks"
            key: tuple[str, str | None, str | None] = (group, layer.rule.name, None)
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            if id(parameter) in embeddings & heads:
                key = ("embeddings, tied with the output head", None, "no rule for embeddings")
            elif id(parameter) in embeddings:
                key = ("embeddings", None, "no rule for embeddings")
            elif id(parameter) in heads and name.endswith("weight"):
                key = ("output head", None, "outside the decoder blocks")
            else:
                key = _unattributed(name, owner, id(parameter) in inside, lora)
        counts[key] = counts.get(key, 0) + parameter.numel()
    total = sum(counts.values())
    rows = [
        CoverageRow(group, count, count / total, rule, rule is not None, reason)
        for (group, rule, reason), count in counts.items()
    ]
    return sorted(rows, key=lambda row: (not row.attributed, -row.parameters, row.group))


def _ids(model: nn.Module, getter: str) -> set[int]:
    found = cast("nn.Module | None", getattr(model, getter)())
    return set() if found is None else {id(parameter) for parameter in found.parameters()}


def _unattributed(name: str, owner: nn.Module, in_block: bool, lora: bool) -> tuple[str, None, str]:
    kind, leaf = type(owner).__name__, name.rpartition(".")[2]
    if any(part.startswith("lora_") for part in name.split(".")):
        return "adapter parameters", None, "not among the attributed layers"
    if leaf == "bias":
        return "biases", None, "no rule for biases"
    if "norm" in kind.lower() or "norm" in name.lower():
        return "norms", None, "no rule for norms"
    if isinstance(owner, nn.Embedding):
        return "embeddings", None, "no rule for embeddings"
    if type(owner) in RULES:
        if not in_block:
            return "linear weights outside the blocks", None, "outside the decoder blocks"
        reason = "frozen: only the adapter is attributed" if lora else "not among the chosen layers"
        return "linear weights of the blocks", None, reason
    return f"other: {kind}.{leaf}", None, f"no rule for {kind}"
