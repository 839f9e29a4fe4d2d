"""A selection from a table of scores, made from a few rows: what all of them would give."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from influence.heads import kept_rows, read_heads, short
from influence.score_table import ScoreTable, rows_of, scored_rows
from influence.selection import (
    OutOfRowsError,
    Rule,
    Selection,
    Terms,
    above_floor,
    deciding,
    pick,
    terms_of,
)

# A column's head holds its share of the turns so many times, as turns pass over taken rows.
_SLACK, _LEAST, _DEEPER = 2.0, 64, 4


class Selected(NamedTuple):
    """A selection, and the scores of the rows that it was made from.

    rows: positions, increasing: every selected row, and the rows that hold the thresholds.
    terms: what the rule means for the pool.
    """

    selection: Selection
    rows: Int[np.ndarray, " s"]
    P: Float[np.ndarray, "s m"]
    terms: Terms

    def scores(self, positions: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r m"]:
        """The scores of some of the rows."""
        return self.P[np.searchsorted(self.rows, positions)]


def select_table(rule: Rule, table: ScoreTable) -> Selected:
    """What `rule` selects of the whole table; see `influence.selection.select`.

    Memory for the rows at the head of the columns, some multiple of the budget, and for a few
    numbers a row of the pool; a few walks over the table.
    Raises InputError as `select` does.
    """
    terms = terms_of(rule, scored_rows(table), _proponents(rule, table))
    group = None if terms.quotas is None else terms.quotas.group
    depths = _first_depths(rule, terms, table.columns)
    while True:
        heads = read_heads(table, lambda P: deciding(rule, P), depths, group)
        rows = kept_rows(heads)
        P = rows_of(table, rows).P
        cut = np.asarray([[not head.complete for head in row] for row in heads])
        try:
            selection = pick(rule, P, terms, rows)
        except OutOfRowsError:
            depths = _deeper(depths, cut)
            continue
        left = ~np.isin(rows, selection.order)
        groups = None if group is None else group[rows]
        lacking = short(heads, rows, deciding(rule, P), left, groups)
        if not lacking.any():
            return Selected(selection, rows, P, terms)
        depths = _deeper(depths, lacking)


def _proponents(rule: Rule, table: ScoreTable) -> Bool[np.ndarray, " n"] | None:
    """Which rows of the pool the rule may take; None: every one with a score."""
    if rule.floor is None:
        return None
    found = np.zeros(table.size, dtype=bool)
    for block in table.blocks():
        scored = ~np.isnan(block.P[:, 0])
        found[block.positions[scored]] = above_floor(rule, block.P[scored])
    return found


def _first_depths(rule: Rule, terms: Terms, columns: int) -> Int[np.ndarray, "c g"]:
    turns = columns if rule.combine == "round_robin" else 1
    groups = 1 if terms.quotas is None else len(terms.quotas.names)
    expected = terms.k
    if rule.budget.tokens is not None and rule.n_tokens is not None:
        # `k` counts the shortest rows; of ordinary ones the tokens hold fewer.
        mean = max(1.0, float(np.mean(rule.n_tokens)))
        expected = min(terms.k, ceil(rule.budget.tokens / mean))
    depth = _LEAST + ceil(expected * (1.0 if turns == 1 else _SLACK / turns))
    return np.full((turns, groups), depth)


def _deeper(
    depths: Int[np.ndarray, "c g"], lacking: Bool[np.ndarray, "c g"]
) -> Int[np.ndarray, "c g"]:
    return np.where(lacking, depths * _DEEPER, depths)
