"""Adam's moments from a training checkpoint, by parameter name, and the two factors of its step.

A checkpoint's optimizer.pt holds the moments under running numbers. Names are kept only by an
optimiser that was built from `named_parameters()`; the Trainer's is not, so the order in which it
numbered them is rebuilt (see `influence.optimizer_order`).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.layers import Layer
from influence.gradients.parameters import is_adapter
from influence.optimizer_order import KEY, Entry, names_by_name, names_by_order

OPTIMIZER_FILE = "optimizer.pt"
_OTHER_OPTIMIZERS = {
    "state1": "bitsandbytes; its quantised states are not supported",
    "exp_avg_sq_row": "Adafactor",
    "exp_avg_sq_col": "Adafactor",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "momentum_buffer": "SGD or Muon",
    "square_avg": "RMSprop",
    "projector": "GaLore",
}


@dataclass(frozen=True)
class AdamState:
    """AdamW between two steps; every dict is by the parameter's full name in the model.

    steps: taken so far. They differ where a parameter had no gradient in some of them (an expert
    that no token reached), and Adam's bias correction goes by each parameter's own.
    exp_avg, exp_avg_sq: in the parameter's stored layout and the stored precision; with amsgrad
    the latter is the running maximum, by which its steps are divided. A parameter that was never
    stepped is in none of the dicts. learning_rate: of the step to come, as the scheduler left it (0
    at the end of most schedules).
    """

    steps: dict[str, int]
    beta1: float
    beta2: float
    eps: float
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    weight_decay: dict[str, float]
    learning_rate: float

    @property
    def step(self) -> int:
        """The optimiser's own number of steps: the largest of its parameters'."""
        return max(self.steps.values())


def adam_scale(
    exp_avg_sq: Float[Tensor, "..."], *, step: int, beta1: float, beta2: float, eps: float
) -> Float[Tensor, "..."]:
    """a of AdamW's next step, theta - lr (a * g + b), with v held fixed; float32 or wider.

    a = ((1 - beta1) / (1 - beta1^(t+1))) / (sqrt(v / (1 - beta2^(t+1))) + eps), with t = `step`
    steps taken (Influence Distillation, arXiv 2505.19051). Where v is 0, as in the embeddings of
    tokens that training never met, a is (1 - beta1) / eps or more, and the gradients of samples
    with such tokens are little else: leave the embeddings out.
    """
    return (1 - beta1) / (1 - beta1 ** (step + 1)) / _denominator(exp_avg_sq, step, beta2, eps)


def adam_offset(
    exp_avg: Float[Tensor, "..."],
    exp_avg_sq: Float[Tensor, "..."],
    parameter: Float[Tensor, "..."],
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Float[Tensor, "..."]:
    """b of AdamW's next step, theta - lr (a * g + b), with v held fixed; float32 or wider.

    b = (beta1 / (1 - beta1^(t+1))) m / (sqrt(v / (1 - beta2^(t+1))) + eps) + weight_decay theta
    (Influence Distillation, arXiv 2505.19051).
    """
    below = _denominator(exp_avg_sq, step, beta2, eps)
    momentum = beta1 / (1 - beta1 ** (step + 1)) * exp_avg.to(below.dtype) / below
    return momentum + weight_decay * parameter.detach().to(_wide(parameter))


def layer_scales(state: AdamState, layers: Iterable[Layer]) -> dict[str, Float[Tensor, "out in"]]:
    """`adam_scale` of every layer, presented as its gradient is, on the layer's device.

    Raises InputError naming the layers that the state has no moments of.
    """
    layers = list(layers)
    missing = [layer.name for layer in layers if layer.name not in state.exp_avg_sq]
    if missing:
        lora = any(map(is_adapter, state.exp_avg_sq))
        advice = "lora" if lora else "patterns of the trained ones"
        raise InputError(
            f"{KEY}: no moments for {len(missing)} of {len(layers)} attributed parameters "
            f"({_some(missing)}): they were frozen or never stepped; set gradients.parameters to "
            f"{advice}"
        )
    scales = {}
    for layer in layers:
        second = state.exp_avg_sq[layer.name]
        if second.shape != layer.parameter.shape:
            raise InputError(
                f"{KEY}: expected moments of shape {tuple(layer.parameter.shape)} for "
                f"{layer.name}, got {tuple(second.shape)}; load the state with this very model"
            )
        scale = adam_scale(
            second.to(layer.parameter.device),
            step=state.steps[layer.name],
            beta1=state.beta1,
            beta2=state.beta2,
            eps=state.eps,
        )
        scales[layer.name] = layer.shape.present(scale)
    return scales


def load_adam_state(path: str, model: nn.Module) -> AdamState:
    """The state of AdamW in a checkpoint folder of transformers' Trainer, or in an optimizer file.

    `model` is the model that was trained, a PEFT model with its adapter; requires_grad need not be
    as it was in training. Parameters are found by name if the file has names, otherwise by the
    Trainer's order, every shape being checked: as trained are tried all parameters, all but the
    embeddings, those that require gradients, and of a PEFT model what its adapter's config trains.
    Only tensors and plain values are read, never a pickle.

    Raises InputError for a file that is missing, unsafe, not AdamW's, or of another model, and if
    the parameters could be assigned in several ways.
    """
    file = _optimizer_file(path)
    saved = _read(file)
    groups = [group for group in saved["param_groups"] if group["params"]]
    entries = [
        [Entry(key, saved["state"].get(key) or {}, group) for key in group["params"]]
        for group in groups
    ]
    _check_adam(file, list(chain(*entries)))
    # Rates that differ may all have come down to 0.
    _common(file, groups, "initial_lr", "lr")
    rate, betas, eps = (_common(file, groups, key) for key in ("lr", "betas", "eps"))
    names = _saved_names(groups)
    if names is None:
        found = names_by_order(file, model, entries)
    else:
        found = names_by_name(file, model, names, list(chain(*entries)))
    stepped = {
        name: each for name, each in zip(found, chain(*entries), strict=True) if each.moments
    }
    return AdamState(
        steps={name: each.step for name, each in stepped.items()},
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        eps=float(eps),
        exp_avg={name: each.moments["exp_avg"] for name, each in stepped.items()},
        exp_avg_sq={name: each.second for name, each in stepped.items()},
        weight_decay={name: float(each.group["weight_decay"]) for name, each in stepped.items()},
        learning_rate=float(rate),
    )


def _denominator(exp_avg_sq: Tensor, step: int, beta2: float, eps: float) -> Tensor:
    return (exp_avg_sq.to(_wide(exp_avg_sq)) / (1 - beta2 ** (step + 1))).sqrt() + eps


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _optimizer_file(path: str) -> str:
    file = os.path.join(path, OPTIMIZER_FILE) if os.path.isdir(path) else path
    if os.path.isfile(file):
        return file
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    raise InputError(
        f"{KEY}: {file} does not exist (in its folder: {_some(there) or 'nothing'}); give a "
        f"checkpoint folder of the Trainer with {OPTIMIZER_FILE} in it, or the file itself. States "
        "that FSDP or DeepSpeed wrote in pieces must be gathered into one file first"
    )


def _read(file: str) -> dict[str, Any]:
    advice = "save the optimizer's state again with torch.save(optimizer.state_dict(), FILE)"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{KEY}: {file} holds more than tensors and plain values, or is no file of torch.save; "
            f"pickled objects are never loaded: {advice} ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{KEY}: {file} cannot be read, it may be cut off: {str(error).splitlines()[0]}; "
            f"{advice}"
        ) from error
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        keys = _some([str(key) for key in saved]) if isinstance(saved, dict) else type(saved)
        raise InputError(
            f"{KEY}: {file} is no optimizer's state: expected the keys state and param_groups, "
            f"found {keys}; give the {OPTIMIZER_FILE} of a checkpoint"
        )
    return saved


def _check_adam(file: str, entries: Sequence[Entry]) -> None:
    """Whether all moments are those of Adam or AdamW, in plain floating-point tensors."""
    stepped = [each for each in entries if each.moments]
    if not stepped:
        raise InputError(
            f"{KEY}: {file} has no moments of any parameter; give a checkpoint that was saved "
            "after an optimizer step"
        )
    needed = {"exp_avg", "exp_avg_sq"}
    odd = set().union(*(needed ^ (each.moments.keys() - {"step"}) for each in stepped))
    odd -= {"max_exp_avg_sq"}
    settings = {"lr", "betas", "eps", "weight_decay"}
    if odd or any(not settings <= each.group.keys() for each in stepped):
        keys = sorted(set().union(*(each.moments for each in stepped)))
        known = next(
            (f" ({_OTHER_OPTIMIZERS[key]})" for key in keys if key in _OTHER_OPTIMIZERS), ""
        )
        raise InputError(
            f"{KEY}: expected the state of AdamW, with exp_avg and exp_avg_sq, but {file} holds "
            f"{', '.join(keys)}{known}; train with optim='adamw_torch', or set optimizer.kind to "
            "sgd"
        )
    for each in stepped:
        tensors = [value for key, value in each.moments.items() if key != "step"]
        if any(type(x) is not Tensor or not x.is_floating_point() for x in tensors):
            raise InputError(
                f"{KEY}: the moments of parameter {each.key} in {file} are not plain "
                "floating-point tensors; quantised or distributed states are not supported"
            )
        if "step" not in each.moments and "step" not in each.group:
            raise InputError(f"{KEY}: {file} has no step for parameter {each.key}; save it again")
        # Adam adds its decay to the gradient, which then passes through the moments.
        coupled = each.group.get("decoupled_weight_decay", True) is False
        if each.group.get("maximize") or (coupled and each.group["weight_decay"]):
            raise InputError(
                f"{KEY}: {file} was written by an Adam with maximize or with a weight decay inside "
                "its gradients; only AdamW's step is known: train with optim='adamw_torch'"
            )


def _common(file: str, groups: Sequence[dict[str, Any]], key: str, otherwise: str = "") -> Any:
    """The value that all groups share."""
    values = [group.get(key, group.get(otherwise)) for group in groups]
    if any(value != values[0] for value in values):
        raise InputError(
            f"{KEY}: expected one {key} for all parameters, but the groups in {file} have "
            f"{values}; only a step with the same one everywhere is known, so train with one"
        )
    return values[0]


def _saved_names(groups: Sequence[dict[str, Any]]) -> list[str] | None:
    """The names in the state dict, if all parameters have one."""
    names: list[str] = []
    for group in groups:
        own = group.get("param_names", group["params"])
        if len(own) != len(group["params"]) or not all(isinstance(name, str) for name in own):
            return None
        names += own
    return names
