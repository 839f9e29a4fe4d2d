"""Which layers of a model are attributed, each with the rule for its type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence.blocks import find_decoder
from influence.errors import InputError
from influence.gradients.conv1d import CONV1D
from influence.gradients.linear import LINEAR
from influence.gradients.rule import LayerRule

Parameters = Literal["all", "lora"]
LORA_FACTORS = ("lora_A", "lora_B")

RULES: dict[type[nn.Module], LayerRule] = {nn.Linear: LINEAR, Conv1D: CONV1D}
"""Rules by exact type: a subclass may compute something else in its forward."""


@dataclass(frozen=True)
class Layer:
    """One attributed weight; its gradient is presented as (out_features, in_features)."""

    name: str
    module: nn.Module
    rule: LayerRule
    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        return self.out_features * self.in_features


def is_lora_factor(name: str) -> bool:
    """True for a module name like `...q_proj.lora_A.default`."""
    return any(part in LORA_FACTORS for part in name.split("."))


def _check_adapter_in_use(model: nn.Module, name: str) -> bool:
    """Whether the adapter is active; InputError if its factors take no part in the forward."""
    owner_name, _factor, adapter = name.rsplit(".", 2)
    owner = model.get_submodule(owner_name)
    if getattr(owner, "merged", False) or getattr(owner, "disable_adapters", False):
        raise InputError(
            f"model.adapter: the adapter at {owner_name} is merged or disabled, so its factors "
            "have no gradient; load it unmerged, or set gradients.parameters to all"
        )
    return adapter in getattr(owner, "active_adapters", [adapter])


def _chosen(model: nn.Module, name: str, parameters: Parameters) -> bool:
    if parameters == "all":
        return not is_lora_factor(name)
    return is_lora_factor(name) and _check_adapter_in_use(model, name)


def attributed_layers(model: nn.Module, parameters: Parameters) -> list[Layer]:
    """The layers whose weights are attributed, in the order of `model.named_modules()`.

    `all`: every linear weight inside the decoder blocks (the base weights of a model with an
    unmerged adapter). `lora`: the A and B factors of the active adapter inside the blocks. The
    embeddings and the output head are no part of either; `coverage` names what is left out.

    Raises InputError if `parameters` is unknown, nothing is found, an adapter is merged, or two
    modules share one weight (one module used many times is supported).
    """
    if parameters not in ("all", "lora"):
        raise InputError(f"gradients.parameters: expected all or lora, got {parameters!r}")
    inside = {id(module) for block in find_decoder(model).blocks for module in block.modules()}
    layers: list[Layer] = []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        rule = RULES.get(type(module))
        if rule is None or id(module) not in inside or not _chosen(model, name, parameters):
            continue
        weight: Tensor = rule.weight(module)
        other = owners.setdefault(id(weight), name)
        if other != name:
            raise InputError(
                f"model.name: {name} and {other} share one weight; layers tied across modules "
                "are not supported, leave one of them out with the `layers` key"
            )
        layers.append(Layer(name, module, rule, *rule.sizes(module)))
    if not layers:
        hint = "give model.adapter" if parameters == "lora" else "use gradients.parameters: lora"
        raise InputError(
            f"gradients.parameters: {type(model).__name__} has no layer to attribute under "
            f"{parameters!r}; {hint}"
        )
    return layers
