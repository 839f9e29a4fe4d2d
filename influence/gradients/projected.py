"""What the engine asks of a projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from influence.gradients.term import Formed, Term


class Projection(Protocol):
    """A random linear map of the gradients of many layers to `dim` numbers, <Px, Py> ~ <x, y>.

    `takes_factors` says whether a term is projected without forming its gradient; both ways give
    the same numbers. Vectors are two independent halves side by side, see `half_products`.
    """

    @property
    def dim(self) -> int: ...

    @property
    def takes_factors(self) -> bool: ...

    def input_side(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What may be made of a layer's inputs ahead of `add_term`, for a `sketched` term.

        It takes far less room than the inputs, which have to be kept from the forward
        pass until the layer's output gradients arrive. None: the layer's terms need the inputs.
        """
        ...

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that each layer's part is added to."""
        ...

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Add the projection of one term of a layer's gradients."""
        ...

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Add the projection of a few formed gradients of a layer."""
        ...
