"""Gradients of token and position embeddings: each token adds its output gradient to one row."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from influence.gradients.linear import presentations
from influence.gradients.rule import Placement, Rule, output_gradients
from influence.gradients.term import OneHot, Term

SCALES = ("embed_scale", "scalar_embed_scale")
"""Attributes under which a scaled embedding keeps its factor (Gemma 3)."""


def _weight_term(module: nn.Module, ids: Tensor, d: Tensor, placement: Placement) -> Term:
    embedding = cast(nn.Embedding, module)
    x = placement.cut(d)
    index = ids.reshape(x.shape[:2])
    if embedding.padding_idx is not None:
        # torch gives the padding's row no gradient, also where it is a real token.
        x = x * (index != embedding.padding_idx).unsqueeze(2)
    scale = next((getattr(module, name) for name in SCALES if hasattr(module, name)), None)
    if scale is not None:
        x = x * scale
    return Term(x, OneHot(index, embedding.num_embeddings), placement.sample(d.device))


EMBEDDING = Rule(
    name="embedding", present=presentations, attach=output_gradients({"weight": _weight_term})
)
