"""What embeddings and exact scores cost, and whether certified rounds cost less than all exact."""

from __future__ import annotations

from dataclasses import replace

from influence import cost
from influence.config import Config
from influence.embedding_kind import EmbeddingKind, named
from influence.load import Load
from influence.model_shape import ModelShape
from influence.report_format import amount


def embedding_flops(config: Config, shape: ModelShape, load: Load, kind: EmbeddingKind) -> float:
    """Operations of a load's embeddings of one kind."""
    return cost.STAGES["embedding"](named(config, kind), shape, load)


def gradient_flops(config: Config, shape: ModelShape, load: Load, columns: int) -> float:
    """Operations of a load's exact scores for so many target columns."""
    products = config.gradients.projection == "exact"
    stage = "inner_products" if products else "gradients"
    return cost.STAGES[stage](config, shape, replace(load, products=load.rows * columns))


def certified_line(
    config: Config, shape: ModelShape, load: Load, columns: int, exact: int
) -> str | None:
    """What certified rounds took, beside exact scores of all candidates; None without candidates.

    The targets' gradients are the same for both, and what an earlier run left in the cache counts
    as if it had been computed.

    Args:
        load: of all candidates that can be scored; their mean counts for a row with exact scores.
        columns: of the scores.
        exact: candidates with exact scores, the audit's too.
    """
    if not load.rows:
        return None
    everything = gradient_flops(config, shape, load, columns)
    took = cost.STAGES["embedding"](config, shape, load) + everything * exact / load.rows
    line = (
        f"certified: {exact:,} of {load.rows:,} candidates got exact scores; with the embeddings "
        f"{amount(took)} FLOP, {took / everything:.2f} of exact scores for all"
    )
    if took >= everything:
        line += (
            ": here `method: exact` costs no more and leaves nothing to estimate (on larger pools, "
            "for smaller budgets and with `combine: mean` a smaller part decides)"
        )
    return line
