"""One step of the optimiser whose scores are asked for: theta - eta (a * (G'w)/n + b).

Influence Distillation, arXiv 2505.19051: candidates move the parameters through a, which is 1 and
b 0 for plain gradient descent; AdamW's and SGD's come from a training checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.layers import Layer
from influence.optimizer_order import KEY
from influence.optimizer_state import layer_offsets, layer_scales, load_adam_state
from influence.sgd_state import (
    load_sgd_state,
    moves_by_gradient_alone,
    sgd_offsets,
    sgd_scales,
)


@dataclass(frozen=True)
class OptimizerStep:
    """a and b by layer, as the layers' gradients are presented; None: 1 everywhere, 0 everywhere.

    note: what the step is of, and how much of the model it covers, for the report.
    """

    scale: dict[str, Float[Tensor, "out in"]] | None
    offset: dict[str, Float[Tensor, "out in"]] | None
    note: str


def load_step(
    kind: str,
    state_path: str | None,
    model: nn.Module,
    layers: Sequence[Layer],
    *,
    with_offset: bool = True,
) -> OptimizerStep:
    """The next step of an optimiser of this kind (`sgd`, `adamw`) from its saved state.

    state_path: a checkpoint folder of the Trainer, the optimizer file in it, or the URL of either;
    None: plain gradient descent, without momentum or weight decay. `model` is the one that was
    trained. a and b are float32 or wider, on the layers' devices. Without `with_offset` b is not
    made: the first order needs a alone.

    Raises InputError for a kind that is not known, AdamW without a state, a state that cannot be
    read or is of another optimiser or model, and for layers that it has no moments of.
    """
    if kind not in _STEPS:
        raise InputError(f"optimizer.kind: {kind!r}; expected one of {', '.join(_STEPS)}")
    if state_path is None:
        require_state(kind)
        return OptimizerStep(None, None, "gradient descent")
    return _STEPS[kind](state_path, model, layers, with_offset)


def has_scale(kind: str, state_path: str | None) -> bool:
    """Whether a is anything but 1, from the file alone.

    Raises InputError as `load_step` does of the kind and the file.
    """
    if state_path is None:
        require_state(kind)
        return False
    return kind != "sgd" or not moves_by_gradient_alone(state_path)


def require_state(kind: str) -> None:
    """Raise InputError for an optimiser that has no step without a state."""
    if kind != "sgd":
        raise InputError(
            f"{KEY}: null, and optimizer.kind: {kind} divides by moments; expected a checkpoint "
            "with the optimizer's state (or a warm-up, which makes one)"
        )


def _adamw(
    path: str, model: nn.Module, layers: Sequence[Layer], with_offset: bool
) -> OptimizerStep:
    state = load_adam_state(path, model)
    scale = layer_scales(state, layers)
    blank = sum(int((state.exp_avg_sq[layer.name] == 0).sum()) for layer in layers)
    size = sum(layer.size for layer in layers)
    note = f"{state.note}; {_coverage(layers, state.exp_avg_sq)}"
    if blank:
        note += (
            f"; {blank:,} of their {size:,} entries ({blank / size:.2%}) never had a gradient and "
            "weigh (1 - beta1) / eps or more"
        )
    return OptimizerStep(scale, layer_offsets(state, layers) if with_offset else None, note)


def _sgd(path: str, model: nn.Module, layers: Sequence[Layer], with_offset: bool) -> OptimizerStep:
    state = load_sgd_state(path, model)
    scale = sgd_scales(state, layers)
    factors = [state[layer.name].factors for layer in layers]
    moved = with_offset and any(each.buffer or each.parameter for each in factors)
    begun = {name: each.buffer for name, each in state.items() if each.buffer is not None}
    note = f"SGD; {_coverage(layers, begun)}"
    return OptimizerStep(
        scale if any(each.gradient != 1 for each in factors) else None,
        sgd_offsets(state, layers) if moved else None,
        note,
    )


def _coverage(layers: Sequence[Layer], moments: dict[str, Tensor]) -> str:
    """How many of the attributed parameters have moments, and what has some and is left out."""
    own = {layer.name for layer in layers}
    others = {name: value.numel() for name, value in moments.items() if name not in own}
    known = sum(name in moments for name in own)
    text = f"moments of {known} of {len(own)} attributed parameters"
    if others:
        total = sum(others.values()) + sum(layer.size for layer in layers)
        text += (
            f"; {len(others)} others have moments, too, and are not attributed "
            f"({sum(others.values()) / total:.1%} of both)"
        )
    return text


_STEPS: dict[str, Callable[[str, nn.Module, Sequence[Layer], bool], OptimizerStep]] = {
    "sgd": _sgd,
    "adamw": _adamw,
}
