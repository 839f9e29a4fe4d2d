"""Weights of the selected rows: the closed form of the first-order robust objective.

Influence Distillation (arXiv 2505.19051, section 3): with the step size going to zero the problem

    minimise  -p'w + (lambda/2) |w|^2    subject to  w >= 0, sum(w) = n

has the solution w_i = max(0, (p_i - tau) / lambda). The budget of k rows fixes both numbers: tau is
the (k+1)-th largest score and lambda = sum over the top k of (p_i - tau) / n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from influence.errors import InputError
from influence.text_columns import Texts


def id_ranks(ids: Sequence[str]) -> Int[np.ndarray, " n"]:
    """The place of every row in the order of ids, equal ids by position: the tie breaker."""
    return (ids if isinstance(ids, Texts) else Texts(ids)).ranks()


def ranked(
    p: Float[np.ndarray, " n"], ranks: Int[np.ndarray, " n"], limit: int
) -> Int[np.ndarray, " at_least_limit"]:
    """Positions of the `limit` largest scores at least, best first, ties by `ranks`; NaN never."""
    rows = np.flatnonzero(~np.isnan(p))
    if 0 < limit < len(rows):
        # Only the head is sorted; all rows equal to the last of it stay in, for the tie breaker.
        bound = np.partition(p[rows], len(rows) - limit)[len(rows) - limit]
        rows = rows[p[rows] >= bound]
    return rows[np.lexsort((ranks[rows], -p[rows]))]


def round_robin_weights(
    P: Float[np.ndarray, "n m"],
    picks: Sequence[Int[np.ndarray, " _"]],
    groups: Int[np.ndarray, " n"] | None = None,
    *,
    n_scored: int | None = None,
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"] | Float[np.ndarray, "m g"]]:
    """(weights (n,), tau) of rows that several columns picked in turn.

    `picks[c]` are the positions that column c picked (a position may be in several). tau_c is
    the largest P[:, c] among rows that no column picked, so that with one column this is the closed
    form of the module's docstring. A row's weight is the sum over the columns that picked it of
    P[row, c] - tau_c, scaled so that all weights sum to n, the number of rows with scores
    (`n_scored`, where P holds only some of them).
    With `groups` (the quota group of every row, 0..g-1) tau is one number per column and group, and
    a pick is held against its own group; a group with no row left takes the column's overall tau.
    Equal weights for all picks where a pick does not exceed its tau, or where no row is left
    unselected (tau is then the column's smallest score): every pick has a positive weight.
    Raises InputError for an infinite score, no scored row or no pick.
    """
    P = np.asarray(P)
    scored: np.ndarray = np.asarray(~np.isnan(P).any(axis=1))
    if np.isinf(P).any():
        raise InputError(
            f"scores: row {int(np.flatnonzero(np.isinf(P).any(axis=1))[0])} has an infinite score; "
            "expected finite numbers, or null for a row that cannot be scored"
        )
    selected = np.zeros(len(P), dtype=bool)
    for rows in picks:
        selected[rows] = True
    if not selected.any():
        raise InputError("selection: no row with a score to select; see the reasons in the report")
    left = np.flatnonzero(scored & ~selected)
    code = np.zeros(len(P), dtype=np.int64) if groups is None else np.asarray(groups)
    tau = np.empty((P.shape[1], int(code.max()) + 1))
    raw = np.zeros(len(P))
    closed_form = left.size > 0
    for column, rows in enumerate(picks):
        p = np.asarray(P[:, column], dtype=np.float64)
        tau[column] = _thresholds(p, left, code[left], tau.shape[1], scored)
        excess = p[rows] - tau[column, code[rows]]
        closed_form = closed_form and bool(np.all(excess > 0))
        raw[rows] += excess
    total = int(np.count_nonzero(scored)) if n_scored is None else n_scored
    if not closed_form:
        raw = selected.astype(np.float64)
    # The sum of the selected rows alone: its order does not depend on which others are there.
    weights = raw * (total / raw[selected].sum())
    return weights, tau[:, 0] if groups is None else tau


def _thresholds(
    p: Float[np.ndarray, " n"],
    left: Int[np.ndarray, " _"],
    left_groups: Int[np.ndarray, " _"],
    count: int,
    scored: np.ndarray,
) -> Float[np.ndarray, " g"]:
    """The largest score left unselected in each group, or overall where a group has none left."""
    if not left.size:
        return np.full(count, p[scored].min())
    best = np.full(count, -np.inf)
    np.maximum.at(best, left_groups, p[left])
    return np.where(np.isfinite(best), best, p[left].max())
