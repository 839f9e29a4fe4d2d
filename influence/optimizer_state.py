"""Adam's moments from a training checkpoint, by parameter name, and the two factors of its step.

A checkpoint's optimizer.pt holds the moments under running numbers. Names are kept only by an
optimiser that was built from `named_parameters()`; the Trainer's is not, so the order in which it
numbered them is rebuilt (see `influence.optimizer_order`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.layers import Layer
from influence.optimizer_file import (
    SavedOptimizer,
    check_plain,
    check_trained,
    common,
    parameter_names,
    read_optimizer,
)
from influence.optimizer_order import KEY

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

    @property
    def note(self) -> str:
        """How far it is, and its settings."""
        return (
            f"AdamW after {self.step} steps (betas {self.beta1:g} and {self.beta2:g}, eps "
            f"{self.eps:g})"
        )


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
    check_trained(layers, state.exp_avg_sq)
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


def layer_offsets(state: AdamState, layers: Iterable[Layer]) -> dict[str, Float[Tensor, "out in"]]:
    """`adam_offset` of every layer, as `layer_scales`; raises the same InputError."""
    layers = list(layers)
    check_trained(layers, state.exp_avg_sq)
    offsets = {}
    for layer in layers:
        device = layer.parameter.device
        offset = adam_offset(
            state.exp_avg[layer.name].to(device),
            state.exp_avg_sq[layer.name].to(device),
            layer.parameter,
            step=state.steps[layer.name],
            beta1=state.beta1,
            beta2=state.beta2,
            eps=state.eps,
            weight_decay=state.weight_decay[layer.name],
        )
        offsets[layer.name] = layer.shape.present(offset)
    return offsets


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
    saved = read_optimizer(path)
    _check_adam(saved)
    # Rates that differ may all have come down to 0.
    common(saved, "initial_lr", "lr")
    rate, betas, eps = (common(saved, key) for key in ("lr", "betas", "eps"))
    found = parameter_names(saved, model)
    stepped = {name: each for name, each in zip(found, saved.flat, strict=True) if each.moments}
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


def _check_adam(saved: SavedOptimizer) -> None:
    """Whether all moments are those of Adam or AdamW, in plain floating-point tensors."""
    file, stepped = saved.file, [each for each in saved.flat if each.moments]
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
    check_plain(saved)
    for each in stepped:
        if "step" not in each.moments and "step" not in each.group:
            raise InputError(f"{KEY}: {file} has no step for parameter {each.key}; save it again")
        # Adam adds its decay to the gradient, which then passes through the moments.
        coupled = each.group.get("decoupled_weight_decay", True) is False
        if each.group.get("maximize") or (coupled and each.group["weight_decay"]):
            raise InputError(
                f"{KEY}: {file} was written by an Adam with maximize or with a weight decay inside "
                "its gradients; only AdamW's step is known: train with optim='adamw_torch'"
            )
