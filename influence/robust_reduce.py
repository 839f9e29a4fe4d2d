"""The second order in the reducer: which further columns rows get, and the programme over them.

Beside its scores every row gets the numbers that its curvature is made of: products with every
target row (fisher), or coefficients along the directions (hvp). Exact rows get them from their
gradients; of others the regression predicts them as it predicts scores, which is the landmark
approximation Q ~ (1/n) C~ (A_L H_T A_L') C~' (Influence Distillation, arXiv 2505.19051).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.cache import Cache
from influence.catalogue import Catalogue
from influence.config import Config
from influence.curvature import Curvature, fisher_curvature, fisher_weights
from influence.objective import Objective
from influence.programme import Programme, account_of, budget_path
from influence.score_table import FirstColumns, ScoreTable, rows_of, scored_rows
from influence.selection import Rule, Selection, combined_score, terms_of
from influence.shard_reader import read_target_rows
from influence.table_selection import Selected
from influence.target_columns import TargetColumns
from influence.units import ExactUnits


@dataclass(frozen=True)
class TargetRow:
    """A target row: its target, its position there, and its share of the mean target loss."""

    target: str
    position: int
    share: float


class RobustReduce:
    """One run's second order, step by step; memory for a few numbers a row of the pool.

    Attributes:
        further: vectors that exact gradients are multiplied with beside the targets' means, or
            None where the scores' own columns say everything.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        pool: Catalogue,
        targets: Mapping[str, Catalogue],
        columns: TargetColumns,
    ) -> None:
        self._config, self._cache, self._pool = config, cache, pool
        self._targets, self._columns = targets, columns
        self.further: Float[np.ndarray, "e d"] | None = None

    def begin(self, exact: ExactUnits) -> None:
        """After the gradients' shards are there: what further columns exact rows get."""
        rows = target_rows(self._columns)
        if len(rows) > len(self._columns.columns):
            of = read_target_rows(self._cache, exact.targets, self._targets, normalize=False)
            self.further = np.stack([of[row.target][row.position] for row in rows])

    @property
    def width(self) -> int:
        """Columns of a row: its scores, and what its curvature is made of."""
        return len(self._columns.columns) + (0 if self.further is None else len(self.further))

    def scores(self, table: ScoreTable) -> ScoreTable:
        """The scores' own columns of a table with all of them."""
        return FirstColumns(table, len(self._columns.columns))

    def select(self, rule: Rule, table: ScoreTable) -> tuple[Selected, Objective]:
        """The programme's selection from a table with all columns, and its account.

        Raises:
            InputError: no row has a score.
        """
        scored = scored_rows(table)
        terms = terms_of(rule, scored)
        positions = np.flatnonzero(scored)
        programme, best = self._programme(rule, table, positions)
        found = programme.solve(terms.k)
        weights = found.solution.weights
        order = programme.order(weights)
        selection = Selection(
            order=positions[order],
            weights=weights[order],
            column=best[order],
            score=programme.p[order],
            tau=np.asarray([found.solution.multiplier]),
            groups=(),
            n_scored=terms.n_scored,
            budget_exceeds_pool=terms.limit.exceeds_pool,
        )
        rows = np.sort(selection.order)
        selected = Selected(selection, rows, rows_of(self.scores(table), rows).P, terms)
        return selected, account_of(programme, found, budget_path(programme, found))

    def _programme(
        self, rule: Rule, table: ScoreTable, positions: Int[np.ndarray, " n"]
    ) -> tuple[Programme, Int[np.ndarray, " n"]]:
        """The programme over the rows with scores, and each one's best column."""
        first = len(self._columns.columns)
        used = slice(0, first) if self.further is None else slice(first, None)
        p, best = np.empty(len(positions)), np.empty(len(positions), dtype=np.int64)
        # float32, as the gradients that these numbers come from: of 10^7 rows they are gigabytes.
        numbers = np.empty((len(positions), self.width - used.start), dtype=np.float32)
        place = 0
        for block in table.blocks():
            P = block.P[~np.isnan(block.P[:, 0])]
            rows = slice(place, place + len(P))
            p[rows], best[rows] = combined_score(P[:, :first], rule.column_target, rule.combine)
            numbers[rows] = P[:, used]
            place = rows.stop
        weights = self._config.weights
        programme = Programme(
            p, self._fisher(numbers), rule.ranks[positions], weights.eta, weights.curvature
        )
        return programme, best

    def _fisher(self, products: Float[np.ndarray, "n t"]) -> Curvature:
        rows = target_rows(self._columns)
        tokens = [self._targets[row.target].n_response_tokens[row.position] for row in rows]
        strengths = fisher_weights(np.asarray(tokens), self._config.gradients.loss_reduction)
        return fisher_curvature(products, np.asarray([row.share for row in rows]), strengths)


def target_rows(columns: TargetColumns) -> Sequence[TargetRow]:
    """Every target row in the order of the columns, with its share of what `mean` combines.

    The combined score is the mean over targets of the mean over a target's columns, each the mean
    over its rows; the shares of one target's equal columns are those of the mean over its rows.
    """
    every = [column.target for column in columns.columns]
    return [
        TargetRow(
            column.target,
            position,
            1.0 / (len(set(every)) * every.count(column.target) * len(column.rows)),
        )
        for column in columns.columns
        for position in column.rows
    ]
