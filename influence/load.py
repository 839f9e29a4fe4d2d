"""How much a model has to compute: counts that floating-point operations follow from."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Load:
    """Rows that a model computes: their number, their tokens, and what grows with both.

    Attributes:
        rows: number of rows; of equal rows in a shard one is computed.
        tokens: of these rows, without padding.
        response_tokens: those of them whose logits are taken.
        squares: sum over the rows of their tokens squared, as attention's products go.
        products: sum over the rows of the target columns that their gradients are multiplied with.
    """

    rows: int = 0
    tokens: int = 0
    response_tokens: int = 0
    squares: int = 0
    products: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Load)))

    def times(self, factor: float) -> Load:
        """So many times as much, in whole numbers."""
        return Load(*(round(getattr(self, f.name) * factor) for f in fields(Load)))
