"""A projection that needs the gradient itself: formed, flattened, and projected part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influence.gradients.contractions import formed_gradients
from influence.gradients.term import Formed, Term, part_runs

Project = Callable[[str, int, Float[Tensor, "c n"]], Float[Tensor, "c dim"]]


@dataclass(frozen=True)
class FormedProjection:
    """`project` takes a layer's name, a part's number and that part's flat gradients."""

    dim: int
    dtype: torch.dtype
    device: torch.device
    project: Project
    takes_factors: bool = False

    def input_side(self, name: str) -> None:
        """Terms need a layer's inputs."""
        del name

    def accumulator(self, rows: int) -> Float[Tensor, "rows dim"]:
        """Zeros that each layer's part is added to."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def add_term(self, name: str, term: Term, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of D' X, which is formed for it."""
        for formed in formed_gradients([term]):
            self.add_formed(name, formed, total)

    def add_formed(self, name: str, formed: Formed, total: Float[Tensor, "b dim"]) -> None:
        """Adds the projection of formed gradients."""
        flat = formed.gradients.to(self.dtype).flatten(1)
        if formed.part is None:
            formed.add_by_sample(total, self.project(name, 0, flat))
            return
        projected = [self.project(name, p, flat[rows]) for p, rows in part_runs(formed.part)]
        formed.add_by_sample(total, torch.cat(projected))
