"""Where a config's optimiser comes in: which stages' gradients are multiplied with its scale.

First order asks for <a * g_i, g_T> (Influence Distillation, arXiv 2505.19051), and the scale a goes
on one side. Rows that are brought to unit length carry it themselves (their length is |a * g_i|);
where lengths stay, it moves to the few targets, and the candidates' shards suit every optimiser;
but where directions have to span the candidates' steps a * g_i themselves (weights.curvature: hvp).
"""

from __future__ import annotations

from influence.config import Config
from influence.methods import METHODS
from influence.optimizer_step import has_scale

CANDIDATES = frozenset({"gradients", "inner_products"})
TARGETS = frozenset({"target_gradients", "target_vectors"})
TARGET_GRADIENTS = "target_gradients"


def scaled_stages(config: Config) -> frozenset[str]:
    """The stages whose gradients are multiplied with a: none where a is 1.

    Raises:
        InputError: an optimiser without its state, or one whose file cannot be read.
    """
    optimizer = config.optimizer
    steps = METHODS[config.method].steps
    if not steps or not has_scale(optimizer.kind, optimizer.state):
        return frozenset()
    weights = config.weights
    spanned = weights.order == 2 and weights.curvature == "hvp"
    return CANDIDATES if config.gradients.normalize or spanned else TARGETS
