"""What config and method say of a selection: the rule that it follows, and whose weights count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from influence.budget import parse_budget
from influence.catalogue import Catalogue
from influence.config import Config
from influence.methods import METHODS
from influence.quotas import Quota
from influence.selection import Rule, Selection
from influence.target_columns import TargetColumns
from influence.weights import id_ranks


def selection_rule(config: Config, pool: Catalogue, columns: TargetColumns) -> Rule:
    """The rule of a run for its pool; it sorts the ids of all rows."""
    section = config.selection
    return Rule(
        column_target=columns.target_of,
        ranks=id_ranks(pool.ids),
        budget=parse_budget(section.budget),
        combine=section.combine,
        sources=pool.sources,
        n_tokens=pool.n_tokens,
        per_source={name: Quota(q.min, q.max) for name, q in section.per_source.items()},
        # Only proponents are kept: training on the others is expected to do harm.
        floor=0.0 if METHODS[config.method].signed else None,
    )


def method_weights(method: str, selection: Selection) -> Selection:
    """With equal weights where the method only ranks: the closed form's are those of the robust
    objective."""
    if METHODS[method].solves_weights:
        return selection
    count = len(selection.order)
    return replace(selection, weights=np.full(count, selection.n_scored / count))
