"""Which parameters of a model the entries of a saved optimizer belong to.

The state dict of a torch optimizer numbers its parameters. The Trainer's order is: of the trained
parameters first those with weight decay, then the others, each group in the order of
`named_parameters`. Which ones were trained is not saved, either, so the likely sets are tried.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.parameters import is_adapter

KEY = "optimizer.state"
# Moments of the shape of their parameter.
_SHAPED = ("exp_avg", "momentum_buffer")
# What the Trainer leaves without weight decay, besides the parameters of LayerNorm modules.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm(\.|$)")


@dataclass(frozen=True)
class Entry:
    """What the file holds for one parameter; no moments: it was never stepped."""

    key: int | str
    moments: dict[str, Any]
    group: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(next(self.moments[key] for key in _SHAPED if key in self.moments).shape)

    @property
    def second(self) -> Tensor:
        return self.moments.get("max_exp_avg_sq", self.moments["exp_avg_sq"])

    @property
    def step(self) -> int:
        # Some fused Adams count in the group.
        return int((self.moments if "step" in self.moments else self.group)["step"])

    def fits(self, shape: tuple[int, ...]) -> bool:
        return not self.moments or self.shape == shape


def names_by_name(
    file: str, model: nn.Module, saved: Sequence[str], entries: Sequence[Entry]
) -> list[str]:
    """The model's own names of the saved ones; tied weights have one name of several."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    known = dict(model.named_parameters(remove_duplicate=False))
    # torch.compile and data parallelism wrap the model.
    bare = [re.sub(r"^(module\.|_orig_mod\.)+", "", name) for name in saved]
    with_adapter = any(map(is_adapter, bare))
    for name, entry in zip(bare, entries, strict=True):
        if name not in known:
            found = f"{name} is in the state, but not in the model"
            raise _foreign(file, model, found, with_adapter)
        shape = tuple(known[name].shape)
        if not entry.fits(shape):
            found = f"{name}: expected shape {shape}, found {entry.shape}"
            raise _foreign(file, model, found, with_adapter)
    return [own[id(known[name])] for name in bare]


def names_by_order(file: str, model: nn.Module, entries: Sequence[Sequence[Entry]]) -> list[str]:
    """The names of all entries, by the one reading of the order that fits every shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fitting: dict[tuple[str, ...], str] = {}
    nearest: tuple[tuple[int, int], str] | None = None
    for trained, names in _trained(model).items():
        for groups in _groupings(model, names):
            place, problem = _first_mismatch(groups, entries, shapes)
            if not problem:
                fitting.setdefault(tuple(chain(*groups)), trained)
            rank = -place, abs(len(names) - sum(map(len, entries)))
            if nearest is None or rank < nearest[0]:
                nearest = rank, f"{problem} (with {trained}, {len(names)}, as the trained)"
    if len(fitting) > 1:
        first, second = list(fitting)[:2]
        name, other = next((a, b) for a, b in zip(first, second, strict=True) if a != b)
        raise InputError(
            f"{KEY}: the parameters in {file} have no names and can be read in several ways, as "
            f"{' or as '.join(fitting.values())}: an entry is of {name} or of {other}; save the "
            "state of an optimizer that was made from model.named_parameters(), which keeps names"
        )
    if not fitting:
        every = list(chain(*entries))
        count = f"{len(every)} parameters in groups of {[len(group) for group in entries]}; "
        found = nearest[1] if nearest else "the model has no parameters"
        raise _foreign(file, model, count + found, _made_with_adapter(file, every))
    return list(next(iter(fitting)))


def _first_mismatch(
    groups: Sequence[Sequence[str]],
    entries: Sequence[Sequence[Entry]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, str]:
    """How many entries fit before the first that does not, and what is wrong there ("": none)."""
    place = 0
    for names, group in zip_longest(groups, entries, fillvalue=()):
        for name, entry in zip_longest(names, group):
            if name is None:
                return place, f"entry {entry.key}: expected no further parameter here"
            if entry is None:
                return place, f"{name}: expected shape {shapes[name]}, found nothing"
            if not entry.fits(shapes[name]):
                return place, f"{name}: expected shape {shapes[name]}, found {entry.shape}"
            place += 1
    return place, ""


def _trained(model: nn.Module) -> dict[str, list[str]]:
    """Which parameters may have been trained: sets of names in the model's order, described."""
    names = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    sets = {"the parameters that require gradients": [n for n in names if names[n].requires_grad]}
    if any(map(is_adapter, names)):
        own = _adapter_parameters(model, list(names))
        return {"the adapter": own, "all parameters": list(names), **sets}
    first = _parameters_of(model, "get_input_embeddings")
    ends = first | _parameters_of(model, "get_output_embeddings")
    return {
        "all parameters": list(names),
        "all but the input embeddings": [n for n in names if id(names[n]) not in first],
        "all but the embeddings": [n for n in names if id(names[n]) not in ends],
        **sets,
    }


def _parameters_of(model: nn.Module, get: str) -> set[int]:
    """The identities of the parameters of the module that `model.get()` returns."""
    found = getattr(model, get)() if hasattr(model, get) else None
    return {id(parameter) for parameter in found.parameters()} if found is not None else set()


def _adapter_parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    """What PEFT trains by the config of the active adapter, whatever is frozen now."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    active: Any = getattr(model, "active_adapters", None) or list(configs)
    if callable(active):
        active = active()
    biases = {getattr(configs.get(name), "bias", "none") for name in active}

    def trained(name: str) -> bool:
        path = name.split(".")
        own = is_adapter(name) or any(p.startswith(("modules_to_save", "trainable_")) for p in path)
        if own:
            return not active or any(adapter in path for adapter in active)
        if not name.endswith("bias") or "original_module" in path:
            return False
        return "all" in biases or ("lora_only" in biases and path[-2] == "base_layer")

    return [name for name in names if trained(name)]


def _groupings(model: nn.Module, names: Sequence[str]) -> list[list[list[str]]]:
    """The names in groups: the Trainer's now, the Trainer's of older releases, or all in one."""
    layer_norms = {
        f"{owner}.{own}" if owner else own
        for owner, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for own, _parameter in module.named_parameters()
    }
    now = {name for name in names if name in layer_norms or _UNDECAYED.search(name.lower())}
    older = {name for name in names if name in layer_norms or "bias" in name}
    split = [
        [[n for n in names if n not in undecayed], [n for n in names if n in undecayed]]
        for undecayed in (now, older, set())
    ]
    return [[group for group in groups if group] for groups in split]


def _made_with_adapter(file: str, entries: Sequence[Entry]) -> bool:
    """By what lies beside the file, otherwise by whether all its matrices are pairs of factors."""
    beside = set(os.listdir(os.path.dirname(file) or "."))
    if beside & {"adapter_config.json", "config.json"}:
        return "adapter_config.json" in beside
    sides = [each.shape for each in entries if each.moments and len(each.shape) == 2]
    pairs = list(zip(sides[::2], sides[1::2], strict=False))
    return bool(pairs) and all(a[0] == b[1] and a[0] <= min(a[1], b[0]) for a, b in pairs)


def _foreign(file: str, model: nn.Module, mismatch: str, with_adapter: bool) -> InputError:
    adapted = any(is_adapter(name) for name, _parameter in model.named_parameters())
    if with_adapter and not adapted:
        advice = (
            "it was saved with an adapter and the model has none: set model.adapter to the "
            "checkpoint's adapter"
        )
    elif adapted and not with_adapter:
        advice = (
            "it was saved in a full fine-tune and the model has an adapter: leave out "
            "model.adapter and set model.name to the checkpoint"
        )
    else:
        advice = (
            "load the model, and the adapter, that this checkpoint was saved with; if they are the "
            "same, save the state of an optimizer made from model.named_parameters(), which keeps "
            "names"
        )
    return InputError(
        f"{KEY}: {file} does not fit this {type(model).__name__}: {mismatch}; {advice}"
    )
