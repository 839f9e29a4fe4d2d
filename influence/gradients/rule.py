"""The one signature that every layer type's gradient rule has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

Factors = tuple[Float[Tensor, "b t in"], Float[Tensor, "b t out"]]


@dataclass(frozen=True)
class LayerRule:
    """How one layer type's per-sample gradient is written as D_i' X_i.

    Norms, inner products and projections are computed from the two factors alone, so a layer type
    is supported as soon as its gradient has this form: X is the input of a linear layer, a column
    of ones for a bias, and so on.
    """

    name: str
    weight: Callable[[nn.Module], Tensor]
    """The parameter whose gradient this is, as the module stores it."""
    sizes: Callable[[nn.Module], tuple[int, int]]
    """(out, in) of the gradient as presented."""
    present: Callable[[Tensor], Float[Tensor, "... out in"]]
    """From the layout in which the weight (and an optimiser's moments) is stored to (out, in)."""
    factors: Callable[[nn.Module, Tensor, Tensor, int], Factors]
    """(module, input, gradient of the output, batch size) -> X and D, with D_i' X_i = G_i."""
