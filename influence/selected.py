"""What a selection looks like: every candidate's columns, and the counts that a summary shows."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from influence.catalogue import Catalogue
from influence.fidelity import true_fidelity
from influence.heads import read_heads
from influence.records import Fidelity
from influence.score_table import ScoreTable, rows_of
from influence.scores import Scores
from influence.selection import Selection, combined_score
from influence.target_columns import TargetColumns

# Rows from which the correlation of scores with lengths is taken.
LENGTH_ROWS = 100_000


@dataclass(frozen=True)
class ScoreColumns:
    """The columns of `scores/` for any rows of the pool: score, target, weight, intervals.

    weights: of the selected rows, by their positions in increasing order.
    """

    columns: TargetColumns
    combine: str
    fidelity: Fidelity
    exact: Bool[np.ndarray, " n"]
    selected: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]

    @classmethod
    def of(
        cls,
        scores: Scores,
        selection: Selection,
        fidelity: Fidelity,
        columns: TargetColumns,
        combine: str,
    ) -> ScoreColumns:
        """Of a run's scores, selection and certificate."""
        order = np.argsort(selection.order)
        return cls(
            columns,
            combine,
            fidelity,
            scores.exact,
            selection.order[order],
            selection.weights[order],
        )

    def __call__(
        self, positions: Int[np.ndarray, " b"], P: Float[np.ndarray, "b m"]
    ) -> dict[str, Any]:
        """One value a row; NaN where a row has no score."""
        score, best = combined_score(P, self.columns.target_of, self.combine)
        labels = [column.label for column in self.columns.columns]
        weight = np.zeros(len(score))
        place = np.minimum(np.searchsorted(self.selected, positions), len(self.selected) - 1)
        taken = self.selected[place] == positions
        weight[taken] = self.weights[place[taken]]
        exact = self.exact[positions]
        found: dict[str, Any] = {
            "score": score,
            "target": pa.array(labels).take(pa.array(best, mask=best < 0)),
            "weight": weight,
            "exact": exact,
        }
        for name, values in zip(self.columns.names, (P @ self.columns.named()).T, strict=True):
            certificate = self.fidelity.targets[name]
            # With too few landmarks the interval of a prediction is unknown: null, not zero.
            predicted = certificate.score_halfwidth
            half = np.where(
                exact,
                certificate.landmark_halfwidth,
                np.nan if predicted is None else predicted,
            )
            found[f"score.{name}"] = values
            found[f"low.{name}"] = values - half
            found[f"high.{name}"] = values + half
        return found


def extremes(
    table: ScoreTable, columns: TargetColumns, combine: str, count: int
) -> tuple[Int[np.ndarray, " best"], Int[np.ndarray, " worst"]]:
    """The `count` rows with the highest and the lowest scores, the most extreme first."""

    def both(P: Float[np.ndarray, "b m"]) -> Float[np.ndarray, "b 2"]:
        score = combined_score(P, columns.target_of, combine)[0]
        return np.stack([score, -score], axis=1)

    (best,), (worst,) = read_heads(table, both, np.full((2, 1), count))
    return (
        best.positions[np.lexsort((best.positions, -best.scores))][:count],
        worst.positions[np.lexsort((-worst.positions, -worst.scores))][:count],
    )


def selected_counts(
    pool: Catalogue,
    selection: Selection,
    table: ScoreTable,
    columns: TargetColumns,
    combine: str,
) -> dict[str, Any]:
    """Rows selected, how many equal weights theirs amount to, and each name's length bias.

    The bias is the Spearman correlation of score and response length, of LENGTH_ROWS rows spread
    evenly over the pool, or all. Of a method whose scores have a sign also how many rows have a
    score above 0 (for one target at least), and how many one below it (for all).
    """
    eligible = pool.eligible
    some = eligible[:: ceil(len(eligible) / LENGTH_ROWS)]
    P = rows_of(table, some).P
    some, P = some[~np.isnan(P[:, 0])], P[~np.isnan(P[:, 0])]
    lengths = pool.n_response_tokens[some].astype(float)
    weights = selection.weights / selection.weights.sum()
    named = (P @ columns.named()).T
    signed = {}
    if selection.proponents is not None:
        signed = {
            "proponents": selection.proponents,
            "opponents": _opponents(table, columns, combine),
            "short_of_proponents": selection.short_of_proponents,
        }
    return {
        **signed,
        "selected": len(selection.order),
        "budget_exceeds_pool": selection.budget_exceeds_pool,
        "length_spearman": {
            name: true_fidelity(values, lengths, 1).spearman
            for name, values in zip(columns.names, named, strict=True)
        },
        "effective_rows": float(1.0 / np.square(weights).sum()),
    }


def _opponents(table: ScoreTable, columns: TargetColumns, combine: str) -> int:
    scores = (combined_score(block.P, columns.target_of, combine)[0] for block in table.blocks())
    return sum(int(np.count_nonzero(score < 0)) for score in scores)


def source_counts(pool: Catalogue, selection: Selection) -> dict[str, tuple[int, int]]:
    """Source -> (rows that can be scored, rows selected)."""
    before = pool.sources.counts(pool.eligible)
    after = pool.sources.counts(np.sort(selection.order))
    return {str(name): (count, after.get(name, 0)) for name, count in before.items()}
