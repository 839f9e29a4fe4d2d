"""The second order in the reducer: which further columns rows get, and the programme over them.

Beside its scores every row gets the numbers that its curvature is made of: products with every
target row (fisher), or coefficients along the directions (hvp). Exact rows get them from their
gradients; of others the regression predicts them as it predicts scores, which is the landmark
approximation Q ~ (1/n) C~ (A_L H_T A_L') C~' (Influence Distillation, arXiv 2505.19051).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from influence import landmarks
from influence.array_files import write_arrays
from influence.cache import Cache
from influence.catalogue import Catalogue
from influence.config import Config
from influence.curvature import (
    Curvature,
    choose_directions,
    fisher_curvature,
    subspace_curvature,
)
from influence.full_vectors import read_vector
from influence.objective import Objective
from influence.programme import Programme, account_of, budget_path
from influence.score_shards import scoring_url
from influence.score_table import FirstColumns, ScoreTable, rows_of, scored_rows
from influence.second_order_plan import Along, DirectionPlan, MadeVectors, row_shares, target_parts
from influence.selection import Rule, Selection, combined_score, terms_of
from influence.shard_reader import read_shards, read_sketches, read_target_rows
from influence.table_selection import Selected
from influence.target_columns import TargetColumns
from influence.text_columns import Labels
from influence.units import ExactUnits
from influence.vector_gram import vector_products

# Landmarks' rows that directions are chosen from; whole gradients are long.
ROW_BYTES = 4 * 10**9


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
        self._uncovered = 0.0
        self._made: MadeVectors | None = None
        self._along: Float[np.ndarray, " t"] | None = None

    def begin(self, exact: ExactUnits) -> DirectionPlan | None:
        """After the gradients' shards are there: the further columns, and the directions if any."""
        if self._config.weights.curvature == "hvp":
            return self._directions(exact)
        rows = row_shares(self._columns)
        if len(rows) > len(self._columns.columns):
            of = read_target_rows(self._cache, exact.targets, self._targets, normalize=False)
            self.further = np.stack([of[row.target][row.position] for row in rows])
        return None

    def take(self, made: MadeVectors | None, along: Along | None) -> None:
        """The shards of the directions' products, and of the target rows' with the offset b."""
        self._made = made
        if along is not None:
            found = {
                name: np.full(len(catalogue), np.nan) for name, catalogue in self._targets.items()
            }
            for name, units in along.items():
                for unit, shard in read_shards(self._cache, units):
                    rows = shard.table.column("row").to_numpy()
                    where = self._targets[name].positions(unit.file, rows)
                    found[name][where] = shard.vectors()[:, 0]
            rows = row_shares(self._columns)
            self._along = np.asarray([found[row.target][row.position] for row in rows])

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

    def _directions(self, exact: ExactUnits) -> DirectionPlan:
        """Those of the landmarks' rows, or of as many rows of a pool whose rows are all exact."""
        positions = self._spanning(exact)
        rows = read_sketches(self._cache, exact, self._pool, positions)
        there = rows.any(axis=1)
        chosen = choose_directions(rows[there], self._config.weights.directions)
        self.further, self._uncovered = chosen.image.T, chosen.uncovered
        url = scoring_url(self._config.run)
        keys = [
            write_arrays(url, "directions", {}, {"weights": np.ascontiguousarray(column)})
            for column in chosen.weights.T
        ]
        parts = target_parts(self._columns, self._targets)
        return DirectionPlan(self._pool.by_file(positions[there]), keys, parts)

    def _spanning(self, exact: ExactUnits) -> Int[np.ndarray, " l"]:
        pool, config = self._pool, self._config
        eligible = pool.eligible
        if exact.wanted is not None:
            files = {file.url: file for file in pool.files}
            wanted = [pool.positions(files[url], rows) for url, rows in exact.wanted.items()]
            eligible = np.intersect1d(eligible, np.concatenate(wanted))
        keys = landmarks.row_keys(config.seed, pool.digests)[eligible]
        sources = Labels.of(pool.sources.codes[eligible], pool.sources.values)
        length = read_length(self._cache, exact)
        count = min(config.landmarks.count, max(config.weights.directions, ROW_BYTES // length))
        return np.sort(eligible[landmarks.CHOOSERS["uniform"](keys, sources, count)])

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
        shares = np.asarray([row.share for row in row_shares(self._columns)])
        along = 0.0 if self._along is None else float(shares @ self._along)
        curvature = self._fisher(numbers, shares) if self._made is None else self._hvp(numbers)
        programme = Programme(
            p,
            curvature,
            rule.ranks[positions],
            weights.eta,
            weights.curvature,
            self._uncovered,
            along,
        )
        return programme, best

    def _fisher(
        self, products: Float[np.ndarray, "n t"], shares: Float[np.ndarray, " t"]
    ) -> Curvature:
        tokens = [
            self._targets[row.target].n_response_tokens[row.position]
            for row in row_shares(self._columns)
        ]
        reduction = self._config.gradients.loss_reduction
        return fisher_curvature(
            products, shares, np.asarray(tokens), self._along, reduction=reduction
        )

    def _hvp(self, coefficients: Float[np.ndarray, "n r"]) -> Curvature:
        made = self._made
        assert made is not None
        read = partial(read_vector, self._cache)
        measured = vector_products(made.directions, made.products, read)
        r = coefficients.shape[1]
        if len(made.directions) == r:
            return subspace_curvature(coefficients, measured)
        return subspace_curvature(
            coefficients, measured[:r, :r], measured[:r, r], offset=float(measured[r, r])
        )


def read_length(cache: Cache, exact: ExactUnits) -> int:
    """Bytes of one gradient as it is kept, in float64."""
    for _unit, shard in read_shards(cache, exact.sketches[:1]):
        return 8 * shard.layout.dim
    raise RuntimeError("gradients come first")
