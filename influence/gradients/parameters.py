"""The choice of parameters whose gradients are taken, by kind, name pattern and decoder block."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Sequence

import torch
from torch import nn

from influence.blocks import Decoder, find_decoder
from influence.errors import InputError

Choice = str | Sequence[str]
KINDS = ("all", "linear", "lora")
_BLOCKS = re.compile(r"(last|random)\s+(\d+)")


def choose_parameters(
    model: nn.Module, parameters: Choice, *, blocks: str = "all", seed: int = 0
) -> dict[str, nn.Parameter]:
    """The chosen parameters by their full names, in the model's order, each once.

    `all`: every parameter of the model but those of an adapter. `linear`: the matrices inside the
    decoder blocks. `lora`: the parameters of the active adapter. Otherwise patterns of full names
    (`*.q_proj.weight`; `*` matches dots, too), a parameter being chosen if it matches one.
    `blocks`: `all`, `last K` (the backward pass then stops at the first of them) or `random K`,
    drawn with the seed; parameters outside the blocks are chosen with `all` only.

    Raises InputError for a choice that cannot be read, a pattern or number that fits nothing, an
    adapter that is merged, and where nothing is left.
    """
    for name, adapter in getattr(model, "peft_config", {}).items():
        if adapter.is_prompt_learning:
            raise InputError(
                f"model.adapter: {name!r} is of type {adapter.peft_type.value}, which puts tokens "
                "of its own before the text; such adapters are not supported"
            )
    decoder = find_decoder(model)
    inside = _block_of(decoder)
    kept = parse_blocks(blocks, len(decoder.blocks), seed)
    floating = {
        name: parameter for name, parameter in model.named_parameters() if has_gradient(parameter)
    }
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    if len(patterns) == 1 and patterns[0] in KINDS:
        chosen = _of_kind(model, floating, patterns[0], inside)
    else:
        chosen = _by_pattern(floating, patterns)
    found = {
        name: parameter
        for name, parameter in chosen.items()
        if kept is None or inside.get(id(parameter)) in kept
    }
    if not found:
        hint = "choose others"
        if "lora" in patterns:
            adapted = hasattr(model, "peft_config")
            hint = "its adapter has no LoRA factors" if adapted else "give model.adapter"
        raise InputError(
            f"gradients.parameters: {type(model).__name__} has nothing to attribute under "
            f"{parameters!r} in blocks {blocks!r}; {hint}"
        )
    return found


def restricted(chosen: dict[str, nn.Parameter], patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Of the chosen parameters those that fit one of the patterns (`*` matches dots, too).

    Raises InputError for a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in chosen):
            known = ", ".join(list(chosen)[:3])
            raise InputError(
                f"layers: {pattern!r} fits no attributed parameter; expected all, auto, or full "
                f"names and patterns of them, such as {known}"
            )
    return {
        name: parameter
        for name, parameter in chosen.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def parse_blocks(blocks: str, count: int, seed: int) -> frozenset[int] | None:
    """The numbers of the chosen blocks, from 0; None: no restriction. Raises InputError."""
    if blocks == "all":
        return None
    match = _BLOCKS.fullmatch(blocks.strip())
    if match is None or not 1 <= int(match[2]) <= count:
        raise InputError(
            f"gradients.blocks: expected all, 'last K' or 'random K' with K from 1 to {count}, the "
            f"number of decoder blocks of this model; got {blocks!r}"
        )
    k = int(match[2])
    if match[1] == "last":
        return frozenset(range(count - k, count))

    def key(block: int) -> bytes:
        return hashlib.blake2b(f"{seed}\0block\0{block}".encode(), digest_size=16).digest()

    return frozenset(sorted(range(count), key=key)[:k])


def has_gradient(parameter: nn.Parameter) -> bool:
    """False for quantised weights: integers and eight-bit floating-point numbers."""
    return parameter.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_adapter(name: str) -> bool:
    """Whether the parameter or module name is one of an adapter's own."""
    return any(part.startswith("lora_") for part in name.split("."))


def _of_kind(
    model: nn.Module, floating: dict[str, nn.Parameter], kind: str, inside: dict[int, int]
) -> dict[str, nn.Parameter]:
    if kind == "lora":
        return {
            name: parameter
            for name, parameter in floating.items()
            if is_adapter(name) and _adapter_in_use(model, name)
        }
    base = {name: parameter for name, parameter in floating.items() if not is_adapter(name)}
    if kind == "all":
        return base
    return {
        name: parameter
        for name, parameter in base.items()
        # A stack of experts keeps its biases as a matrix.
        if parameter.ndim >= 2 and id(parameter) in inside and not name.endswith("bias")
    }


def _by_pattern(
    floating: dict[str, nn.Parameter], patterns: Sequence[str]
) -> dict[str, nn.Parameter]:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in floating):
            known = ", ".join(list(floating)[:3])
            raise InputError(
                f"gradients.parameters: {pattern!r} matches no parameter; expected all, linear, "
                f"lora, or patterns of full names such as {known}"
            )
    return {
        name: parameter
        for name, parameter in floating.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _block_of(decoder: Decoder) -> dict[int, int]:
    return {
        id(parameter): index
        for index, block in enumerate(decoder.blocks)
        for parameter in block.parameters()
    }


def _adapter_in_use(model: nn.Module, name: str) -> bool:
    """Whether the adapter is active; InputError if its factors take no part in the forward."""
    path = name.split(".")
    depth = next(index for index, part in enumerate(path) if part.startswith("lora_"))
    owner, adapter = model.get_submodule(".".join(path[:depth])), path[depth + 1]
    if getattr(owner, "merged", False) or getattr(owner, "disable_adapters", False):
        raise InputError(
            f"model.adapter: the adapter at {'.'.join(path[:depth])} is merged or disabled, so its "
            "factors have no gradient; load it unmerged, or set gradients.parameters to all"
        )
    return adapter in getattr(owner, "active_adapters", [adapter])
