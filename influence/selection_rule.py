"""What config and method say of a selection: the rule that it follows, and whose weights count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from influence.budget import parse_budget
from influence.catalogue import Catalogue
from influence.config import Config
from influence.methods import METHODS
from influence.quotas import Quota
from influence.selection import Rule, Selection, terms_of
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
        per_source=_quotas(config),
        # Only proponents are kept: training on the others is expected to do harm.
        floor=0.0 if METHODS[config.method].signed else None,
    )


def _quotas(config: Config) -> dict[str, Quota]:
    return {name: Quota(q.min, q.max) for name, q in config.selection.per_source.items()}


def check_quotas(config: Config, pool: Catalogue) -> None:
    """Quotas that the pool cannot meet, found before anything is computed of it.

    Rows may still turn out to have no score; `terms_of` looks again. How many rows a method that
    keeps proponents takes is not known yet: of one row shares and patterns are seen.

    Raises:
        InputError: names selection.per_source and what is wrong with it.
    """
    section = config.selection
    if not section.per_source:
        return
    budget = 1 if METHODS[config.method].signed else section.budget
    rule = Rule(
        column_target=np.empty(0, dtype=np.int64),
        ranks=np.empty(0, dtype=np.int64),
        budget=parse_budget(budget),
        combine=section.combine,
        sources=pool.sources,
        n_tokens=pool.n_tokens,
        per_source=_quotas(config),
    )
    terms_of(rule, pool.scorable)


def method_weights(method: str, selection: Selection) -> Selection:
    """With equal weights where the method only ranks: the closed form's are those of the robust
    objective."""
    if METHODS[method].solves_weights:
        return selection
    count = len(selection.order)
    return replace(selection, weights=np.full(count, selection.n_scored / count))
