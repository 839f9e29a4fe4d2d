"""From scores to a selection: budgets, several targets, quotas per source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from influence.budget import Budget, RowLimit, limit_to_proponents, row_limit
from influence.errors import InputError
from influence.quotas import Quota, QuotaState, open_quotas
from influence.weights import id_ranks, ranked, round_robin_weights

COMBINATIONS = ("mean", "max", "round_robin")


@dataclass(frozen=True)
class Selection:
    """The k selected rows, best first (round robin: in the order of the turns).

    `order` holds positions in the pool and `weights` their weights, which sum to `n_scored`, the
    number of rows with scores. `column` is the column of P that picked each row (mean and max: its
    best column) and `score` the score it was picked for. `tau` has one threshold for mean and
    max, one per column for round robin, and with quotas a second axis: the groups in the order of
    `groups`, the last one for the rows of no quota; `group` is the group of every row of the pool.
    With a rule that takes proponents only, `proponents` is how many there are, and
    `short_of_proponents` says that the budget would have held more.
    """

    order: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    column: Int[np.ndarray, " k"]
    score: Float[np.ndarray, " k"]
    tau: Float[np.ndarray, " t"] | Float[np.ndarray, "t g"]
    groups: tuple[str, ...]
    n_scored: int
    budget_exceeds_pool: bool
    group: Int[np.ndarray, " n"] | None = None
    proponents: int | None = None
    short_of_proponents: bool = False


@dataclass(frozen=True)
class Rule:
    """A selection rule for a pool of n rows, ready to be applied to many matrices of scores.

    `column_target` is the target of each column, `ranks` the place of each row among equal scores
    (`influence.weights.id_ranks`). With a `floor` a row is only taken for a score above it; a
    column without such a row passes its turns.
    """

    column_target: Int[np.ndarray, " m"]
    ranks: Int[np.ndarray, " n"]
    budget: Budget
    combine: str = "round_robin"
    sources: Sequence[str] | None = None
    n_tokens: Int[np.ndarray, " n"] | None = None
    per_source: Mapping[str, Quota] | None = None
    floor: float | None = None

    def __call__(self, P: Float[np.ndarray, "n m"]) -> Selection:
        """Select by these scores; see `select`."""
        return _select(self, P)

    def decides(self) -> Float[np.ndarray, "m c"]:
        """The scores that decide are P @ decides(): one for `mean`, else every column."""
        columns = np.asarray(self.column_target)
        if self.combine != "mean":
            return np.eye(len(columns))
        targets, sizes = np.unique(columns, return_counts=True)
        size = sizes[np.searchsorted(targets, columns)]
        return (1.0 / (size * len(targets)))[:, None]


def combined_score(
    P: Float[np.ndarray, "n m"], column_target: Int[np.ndarray, " m"], combine: str
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(score, best column) of every row; NaN and -1 for a row without scores.

    `column_target` is the target that each column belongs to. `mean`: the mean over targets of
    the mean over a target's columns; the best column is the highest one of the target with the
    highest mean. `max`: the largest column and its value. `round_robin` has no single
    score: the row's highest column is what a turn would take it for, so it is reported as for max.
    Raises InputError for an unknown name or a row that has scores in some columns only.
    """
    P, column_target = _check_scores(P, column_target, combine)
    missing = np.isnan(P[:, 0])
    if combine != "mean":
        best = np.argmax(np.where(missing[:, None], 0.0, P), axis=1)
        score = P[np.arange(len(P)), best].astype(np.float64)
        return score, np.where(missing, -1, best)
    score = np.zeros(len(P))
    best = np.full(len(P), -1)
    best_mean = np.full(len(P), -np.inf)
    targets = np.unique(column_target)
    for target in targets:
        columns = np.flatnonzero(column_target == target)
        part = P[:, columns]
        mean = part.mean(axis=1, dtype=np.float64)
        score += mean / len(targets)
        better = mean > best_mean  # False for NaN: an unscored row keeps -1
        best[better] = columns[np.argmax(part[better], axis=1)]
        best_mean[better] = mean[better]
    return score, best


def select(
    P: Float[np.ndarray, "n m"],
    *,
    column_target: Int[np.ndarray, " m"],
    ids: Sequence[str],
    budget: Budget,
    combine: str = "round_robin",
    sources: Sequence[str] | None = None,
    n_tokens: Int[np.ndarray, " n"] | None = None,
    per_source: Mapping[str, Quota] | None = None,
) -> Selection:
    """Select rows by their scores (higher is better); NaN rows never, ties by id then position.

    `mean` and `max` take the best rows by `combined_score`. `round_robin` takes turns: turn j
    belongs to target j mod T and to that target's column (j div T) mod its number of columns, and
    takes this column's best row not yet taken (Influence Distillation, arXiv 2505.19051, and RDS+,
    arXiv 2503.01807, section 3, use it per target sample). A row budget larger than the
    pool takes every scored row and sets `budget_exceeds_pool`; so does a token budget. A token
    budget takes rows in order and ends before the first that would exceed it. Quotas
    (`influence.quotas`) need a budget in rows. Weights: `influence.weights.round_robin_weights`.
    O(n m) for the scores, O(k m log k) for the order and the turns (n for k with quotas).
    Raises InputError naming the config key for infeasible quotas or a budget that holds no row.
    """
    if len(ids) != len(P):
        raise InputError(f"selection: {len(ids)} ids for {len(P)} rows of scores")
    ranks = id_ranks(ids)
    return Rule(column_target, ranks, budget, combine, sources, n_tokens, per_source)(P)


def _select(rule: Rule, P: Float[np.ndarray, "n m"]) -> Selection:
    P, _ = _check_scores(P, rule.column_target, rule.combine)
    terms = terms_of(rule, ~np.isnan(P[:, 0]), above_floor(rule, P))
    return pick(rule, P, terms, np.arange(len(P)))


class OutOfRowsError(Exception):
    """The rows that a selection is made from do not hold what the budget does."""


@dataclass(frozen=True)
class Terms:
    """What a rule means for a pool: rows to take, its quotas, the rows with scores."""

    limit: RowLimit
    n_scored: int
    quotas: QuotaState | None

    @property
    def k(self) -> int:
        """Rows to take."""
        return self.limit.rows


def above_floor(rule: Rule, P: Float[np.ndarray, "b m"]) -> Bool[np.ndarray, " b"] | None:
    """Which rows the rule may take at all; None if it has no floor."""
    if rule.floor is None:
        return None
    return deciding(rule, P).max(axis=1) > rule.floor


def terms_of(
    rule: Rule, scored: Bool[np.ndarray, " n"], proponents: Bool[np.ndarray, " n"] | None = None
) -> Terms:
    """The rule for a pool of which these rows have scores, and these ones may be taken (None: all).

    Raises InputError naming the config key for infeasible quotas, or if there is no row to take.
    """
    n_scored = int(np.count_nonzero(scored))
    if not n_scored:
        raise InputError("selection: no candidate has a score; see the reasons in the report")
    if proponents is None:
        limit = RowLimit(*row_limit(rule.budget, scored, rule.n_tokens))
    else:
        limit = limit_to_proponents(rule.budget, scored, proponents, rule.n_tokens)
    quotas = None
    if rule.per_source:
        if rule.budget.tokens is not None:
            raise InputError(
                "selection.per_source: quotas are shares of rows and do not go with a token "
                "budget; write selection.budget in rows or as a percentage"
            )
        if rule.sources is None:
            raise InputError("selection.per_source: the candidates carry no source; drop the quota")
        taken_from = scored if proponents is None else proponents
        quotas = open_quotas(rule.per_source, rule.sources, taken_from, limit.rows)
    return Terms(limit, n_scored, quotas)


def deciding(rule: Rule, P: Float[np.ndarray, "b m"]) -> Float[np.ndarray, "b c"]:
    """The scores that the rule ranks rows by: one for `mean` and `max`, else every column."""
    if rule.combine == "round_robin":
        return P
    return combined_score(P, rule.column_target, rule.combine)[0][:, None]


def pick(
    rule: Rule, P: Float[np.ndarray, "s m"], terms: Terms, rows: Int[np.ndarray, " s"]
) -> Selection:
    """The selection, if `rows` of the pool (with these scores) hold whatever can be taken.

    `rule` and `terms` are those of the whole pool. Positions in the result are the pool's.
    """
    budget, quotas = rule.budget, terms.quotas
    scores = deciding(rule, P)
    best, turns = None, _turns(np.asarray(rule.column_target))
    if rule.combine != "round_robin":
        best, turns = combined_score(P, rule.column_target, rule.combine)[1], [[0]]
    group = None if quotas is None else quotas.group[rows]
    if quotas is not None and group is not None:
        # Copies: taking rows uses the quotas up.
        quotas = replace(
            quotas,
            group=group,
            barred=quotas.barred[rows],
            owed=quotas.owed.copy(),
            room=quotas.room.copy(),
        )
    tokens = None
    if budget.tokens is not None and rule.n_tokens is not None:
        tokens = np.asarray(rule.n_tokens)[rows]
    order, picker = _take(
        scores, turns, rule.ranks[rows], terms.k, quotas, tokens, budget.tokens, rule.floor
    )
    if not len(order):
        raise InputError(
            f"selection.budget: {budget.tokens} tokens hold not even the best row; expected more"
        )
    picks = [order[picker == column] for column in range(scores.shape[1])]
    weights, tau = round_robin_weights(scores, picks, group, n_scored=terms.n_scored)
    return Selection(
        order=rows[order],
        weights=weights[order],
        column=picker if best is None else best[order],
        score=np.asarray(scores[order, picker], dtype=np.float64),
        tau=tau,
        groups=() if quotas is None else quotas.names,
        n_scored=terms.n_scored,
        budget_exceeds_pool=terms.limit.exceeds_pool,
        group=None if terms.quotas is None else terms.quotas.group,
        proponents=terms.limit.proponents,
        short_of_proponents=terms.limit.short,
    )


def _check_scores(
    P: np.ndarray, column_target: np.ndarray | Sequence[int], combine: str
) -> tuple[np.ndarray, np.ndarray]:
    P, column_target = np.asarray(P), np.asarray(column_target)
    if combine not in COMBINATIONS:
        raise InputError(
            f"selection.combine: {combine!r}; expected one of {', '.join(COMBINATIONS)}"
        )
    if P.ndim != 2 or not P.shape[1] or column_target.shape != P.shape[1:]:
        raise InputError(f"scores of shape {P.shape} for {column_target.shape} columns of targets")
    missing = np.isnan(P)
    partly = np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1))
    if partly.size:
        column = int(np.flatnonzero(missing[partly[0]])[0])
        raise InputError(
            f"scores: row {partly[0]} has no score in column {column} (target "
            f"{column_target[column]}) but has others ({partly.size} such rows); expected a "
            "score for every target or for none: check this target's gradients"
        )
    return P, column_target


def _turns(column_target: Int[np.ndarray, " m"]) -> list[list[int]]:
    """The columns of each target, targets in ascending order."""
    targets = np.unique(column_target)
    return [np.flatnonzero(column_target == target).tolist() for target in targets]


def _take(
    scores: Float[np.ndarray, "n m"],
    turns: list[list[int]],
    ranks: Int[np.ndarray, " n"],
    k: int,
    quotas: QuotaState | None,
    n_tokens: np.ndarray | None,
    max_tokens: int | None,
    floor: float | None = None,
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Up to k positions in the order they are taken, and the column that took each."""
    # A pointer passes at most k taken rows, so the best k of a column are enough; with quotas it
    # may pass whole sources. Whatever bars a row bars it for good, so pointers only move forward.
    limit = len(scores) if quotas is not None else k
    heads = [ranked(scores[:, c], ranks, limit) for c in range(scores.shape[1])]
    barred = np.zeros(len(scores), dtype=bool) if quotas is None else quotas.barred
    pointers = [0] * len(heads)
    order, picker, used = [], [], 0
    passing: set[int] = set()  # columns whose best row left is not above the floor
    turn = -1
    while len(order) < k and len(passing) < len(heads):
        turn += 1
        columns = turns[turn % len(turns)]
        column = columns[(turn // len(turns)) % len(columns)]
        if column in passing:
            continue
        pointers[column] = _next_free(heads[column], pointers[column], barred)
        row = int(heads[column][pointers[column]])
        if floor is not None and scores[row, column] <= floor:
            passing.add(column)
            continue
        if n_tokens is not None and max_tokens is not None:
            used += int(n_tokens[row])
            if used > max_tokens:
                break
        order.append(row)
        picker.append(column)
        barred[row] = True
        if quotas is not None:
            quotas.take(row)
    return np.asarray(order, dtype=np.int64), np.asarray(picker, dtype=np.int64)


def _next_free(head: Int[np.ndarray, " _"], start: int, barred: np.ndarray) -> int:
    """The first place from `start` on whose row is not barred; blocks double, so long runs skip."""
    size = 8
    if not barred[head[start]]:
        return start
    while start < len(head):
        free = np.flatnonzero(~barred[head[start : start + size]])
        if free.size:
            return start + int(free[0])
        start += size
        size *= 2
    raise OutOfRowsError("a column ran out of rows")
