"""AdamW's next update as a function of one sample's gradient: what LESS calls Gamma."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def adam_update(
    gradient: Float[Tensor, "..."],
    exp_avg: Float[Tensor, "..."],
    exp_avg_sq: Float[Tensor, "..."],
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> Float[Tensor, "..."]:
    """Gamma = m' / (sqrt(v') + eps), with which AdamW's next step is -lr Gamma, decay apart.

    m' = (beta1 m + (1 - beta1) g) / (1 - beta1^(t+1)) and v' = (beta2 v + (1 - beta2) g * g) /
    (1 - beta2^(t+1)), entry by entry, after t = `step` steps with the moments m, v (LESS, Xia et
    al., arXiv 2402.04333, sections 2 and 3). Unlike a of `influence.optimizer_state`, v moves with
    g and m counts: Gamma is not linear in g, and not 0 where g is.
    """
    first = beta1 * exp_avg + (1 - beta1) * gradient
    second = beta2 * exp_avg_sq + (1 - beta2) * gradient.square()
    first /= 1 - beta1 ** (step + 1)
    second /= 1 - beta2 ** (step + 1)
    return first.div_(second.sqrt_().add_(eps))


@dataclass(frozen=True)
class LayerMoments:
    """A layer's moments, presented as its gradient is, and the settings of its AdamW.

    step: taken so far. parts: as of the layer (`influence.gradients.term`): (out, in) holds them
    below each other.
    """

    exp_avg: Float[Tensor, "out in"]
    exp_avg_sq: Float[Tensor, "out in"]
    step: int
    beta1: float
    beta2: float
    eps: float
    parts: int = 1
