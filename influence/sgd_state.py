"""torch's SGD between two steps, from a training checkpoint, and the factors of its next step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.layers import Layer
from influence.optimizer_file import (
    SavedOptimizer,
    check_plain,
    check_trained,
    local_state,
    parameter_names,
    read_optimizer,
)
from influence.optimizer_order import KEY, Entry

_SETTINGS = {"lr", "momentum", "dampening", "weight_decay", "nesterov"}


class SgdFactors(NamedTuple):
    """One parameter's step: theta - lr (gradient g + buffer u + parameter theta)."""

    gradient: float
    buffer: float
    parameter: float


@dataclass(frozen=True)
class SgdParameter:
    """A parameter between two steps: the factors of the next one, and its momentum buffer u.

    buffer: None where it has not begun; otherwise it has the parameter's stored layout.
    """

    factors: SgdFactors
    buffer: Tensor | None


def sgd_factors(
    *, momentum: float, dampening: float, nesterov: bool, weight_decay: float, begun: bool
) -> SgdFactors:
    """The factors of the next step of torch.optim.SGD; `begun`: there is a momentum buffer u.

    With h = g + weight_decay theta the buffer becomes u' = momentum u + (1 - dampening) h, or h in
    its first step, and the step is u', with `nesterov` h + momentum u', without momentum h.
    """
    direct, kept = 1.0, 0.0
    if momentum:
        direct, kept = (1 - dampening, momentum) if begun else (1.0, 0.0)
        if nesterov:
            direct, kept = 1 + momentum * direct, momentum * kept
    return SgdFactors(direct, kept, direct * weight_decay)


def load_sgd_state(path: str, model: nn.Module) -> dict[str, SgdParameter]:
    """SGD's parameters by their full names, of a checkpoint folder of the Trainer or a file.

    Names are found as for Adam (`influence.optimizer_file.parameter_names`). Only tensors and plain
    values are read, never a pickle.

    Raises InputError for a file that is missing, unsafe, not SGD's, or of another model, and if the
    parameters could be assigned in several ways.
    """
    saved = read_optimizer(path)
    _check_sgd(saved)
    names = parameter_names(saved, model)
    return {
        name: SgdParameter(_factors(each), each.moments.get("momentum_buffer"))
        for name, each in zip(names, saved.flat, strict=True)
    }


def moves_by_gradient_alone(path: str) -> bool:
    """Whether the gradient's factor is 1 for every parameter: a = 1; needs no model.

    Raises InputError as `load_sgd_state` does of the file.
    """
    file = local_state(path)
    status = os.stat(file)
    return _gradient_alone(file, status.st_size, status.st_mtime_ns)


def sgd_scales(
    state: dict[str, SgdParameter], layers: Sequence[Layer]
) -> dict[str, Float[Tensor, "out in"]]:
    """a of every layer, presented as its gradient is: one number, which takes no memory.

    Raises InputError naming the layers that the state does not have.
    """
    check_trained(layers, state)
    return {
        layer.name: torch.tensor(
            state[layer.name].factors.gradient,
            dtype=torch.promote_types(layer.parameter.dtype, torch.float32),
            device=layer.parameter.device,
        ).expand(layer.out_features, layer.in_features)
        for layer in layers
    }


def sgd_offsets(
    state: dict[str, SgdParameter], layers: Sequence[Layer]
) -> dict[str, Float[Tensor, "out in"]]:
    """b of every layer, presented as its gradient is; float32 or wider.

    Raises InputError naming the layers that the state does not have, or of another shape.
    """
    check_trained(layers, state)
    offsets = {}
    for layer in layers:
        factors, buffer = state[layer.name].factors, state[layer.name].buffer
        wide = torch.promote_types(layer.parameter.dtype, torch.float32)
        offset = factors.parameter * layer.parameter.detach().to(wide)
        if buffer is not None:
            if buffer.shape != layer.parameter.shape:
                raise InputError(
                    f"{KEY}: expected a buffer of shape {tuple(layer.parameter.shape)} for "
                    f"{layer.name}, got {tuple(buffer.shape)}; load the state with this very model"
                )
            offset = offset + factors.buffer * buffer.to(offset)
        offsets[layer.name] = layer.shape.present(offset)
    return offsets


@lru_cache(maxsize=16)
def _gradient_alone(file: str, _size: int, _modified: int) -> bool:
    saved = read_optimizer(file)
    _check_sgd(saved)
    return all(_factors(each).gradient == 1 for each in saved.flat)


def _factors(entry: Entry) -> SgdFactors:
    group = entry.group
    return sgd_factors(
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        nesterov=bool(group["nesterov"]),
        weight_decay=float(group["weight_decay"]),
        begun="momentum_buffer" in entry.moments,
    )


def _check_sgd(saved: SavedOptimizer) -> None:
    """Whether the file is that of torch.optim.SGD, its buffers plain tensors."""
    moments = sorted(set().union(*(each.moments for each in saved.flat)))
    lacking = sorted(_SETTINGS - set.intersection(*(set(group) for group in saved.groups)))
    if lacking or set(moments) - {"momentum_buffer"}:
        found = f"moments {', '.join(moments)}" if not lacking else f"no {', '.join(lacking)}"
        raise InputError(
            f"{KEY}: expected the state of torch.optim.SGD, but {saved.file} has {found}; give a "
            "checkpoint of a training with optim='sgd', or set optimizer.kind to adamw for one of "
            "AdamW"
        )
    check_plain(saved)
    if any(group.get("maximize") for group in saved.groups):
        raise InputError(
            f"{KEY}: {saved.file} was written by an SGD with maximize, which moves the other way; "
            "train without it"
        )
