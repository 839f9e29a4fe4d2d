"""Which parameters of a model are attributed, each with the rules for the modules that use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from influence.blocks import find_decoder
from influence.errors import InputError
from influence.gradients.by_sample import BY_SAMPLE
from influence.gradients.lora import LORA, plain_adapter
from influence.gradients.parameters import Choice, choose_parameters, restricted
from influence.gradients.rule import Presentation, Rule
from influence.gradients.rules import rule_of


@dataclass(frozen=True)
class Use:
    """A module that computes with the parameter, under the name that the rule knows it by.

    path: the module's full name.
    """

    module: nn.Module
    own_name: str
    rule: Rule
    path: str


@dataclass(frozen=True)
class Layer:
    """One attributed parameter; its gradient is presented as (out_features, in_features).

    name: the parameter's full name in the model. parts: how many matrices lie below each other in
    the presented gradient (experts), each of out_features / parts rows. uses: one, or several where
    modules share the parameter.
    """

    name: str
    parameter: nn.Parameter
    shape: Presentation
    uses: tuple[Use, ...]

    @property
    def parts(self) -> int:
        return self.shape.parts

    @property
    def out_features(self) -> int:
        return self.shape.parts * self.shape.out

    @property
    def in_features(self) -> int:
        return self.shape.in_

    @property
    def size(self) -> int:
        return self.out_features * self.in_features

    @property
    def rule(self) -> str:
        """The names of its rules."""
        return " + ".join(dict.fromkeys(use.rule.name for use in self.uses))


def attributed_layers(
    model: nn.Module,
    parameters: Choice,
    *,
    blocks: str = "all",
    seed: int = 0,
    only: Sequence[str] | None = None,
) -> list[Layer]:
    """The chosen parameters in the order of the model's modules; see `choose_parameters`.

    `only`: of these, those whose full names fit one of the patterns.
    Raises InputError if nothing is chosen, or if modules that share a parameter see it differently.
    """
    chosen = choose_parameters(model, parameters, blocks=blocks, seed=seed)
    if only is not None:
        chosen = restricted(chosen, only)
    names = {id(parameter): name for name, parameter in chosen.items()}
    uses: dict[str, list[Use]] = {name: [] for name in chosen}
    blocks_of_model = find_decoder(model).blocks
    for module_name, module in model.named_modules():
        own = [
            (own_name, names[id(parameter)])
            for own_name, parameter in module.named_parameters(
                recurse=False, remove_duplicate=False
            )
            if id(parameter) in names
        ]
        if not own:
            continue
        path, prefix = _caller(model, blocks_of_model, module_name)
        rule = rule_of(module) if not prefix else BY_SAMPLE
        if not prefix and (owner := _lora_owner(model, module_name)):
            path, prefix, rule = owner, module_name.removeprefix(owner + ".") + ".", LORA
        caller = module if not prefix else model.get_submodule(path)
        for own_name, name in own:
            uses[name].append(Use(caller, prefix + own_name, rule, path))
    return [_layer(name, chosen[name], uses[name]) for name in chosen]


def _layer(name: str, parameter: nn.Parameter, uses: Sequence[Use]) -> Layer:
    shapes = {use.rule.present(use.module)[use.own_name] for use in uses}
    if len(shapes) > 1:
        raise InputError(
            f"gradients.parameters: the modules that share {name} see it in different layouts "
            f"({shapes}); leave it out"
        )
    return Layer(name, parameter, shapes.pop(), tuple(uses))


def _caller(model: nn.Module, blocks: nn.ModuleList, name: str) -> tuple[str, str]:
    """The module whose forward uses the parameters of module `name`, and the way from it to them.

    Containers have no forward, peft's wrapper of fused tensors reads its factors' weights instead
    of calling them, and the modules of a list inside a block may be experts, each of which sees
    tokens of many samples in an order of its own: there the owner of the list counts.
    """
    from peft.tuners.lora.layer import ParamWrapper

    path = name.split(".") if name else []
    best = len(path)
    while best > 0 and not has_forward(_at(model, path[:best])):
        best -= 1
    inside = False
    for depth in range(best):
        owner = _at(model, path[:depth])
        wraps = isinstance(owner, ParamWrapper) and path[depth].startswith("lora_")
        if wraps or (inside and isinstance(_at(model, path[: depth + 1]), nn.ModuleList)):
            best = depth
            break
        inside = inside or owner is blocks
    return ".".join(path[:best]), ".".join(path[best:]) + "." if best < len(path) else ""


def _lora_owner(model: nn.Module, name: str) -> str | None:
    """The peft layer of which module `name` is a factor, if it is plain LoRA."""
    owner, *factor = name.rsplit(".", 2)
    if len(factor) < 2 or factor[0] not in ("lora_A", "lora_B"):
        return None
    return owner if plain_adapter(model.get_submodule(owner)) == factor[1] else None


def _at(model: nn.Module, path: Sequence[str]) -> nn.Module:
    return model.get_submodule(".".join(path))


def has_forward(module: nn.Module) -> bool:
    """Whether the module computes something itself (a container does not)."""
    return type(module).forward is not nn.Module.forward
