"""Which rows belong to the selection that all exact scores would give, and how surely.

Scores that are not known are drawn from the posterior many times, and each time the selection rule
in use is applied to the whole. So every budget, combination of targets and quota is judged by what
it does, and the recall that is stated comes with its distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import log_ndtr

from influence.heads import read_heads
from influence.posterior import Calibration
from influence.score_table import ScoreBlock, ScoreTable, rows_of
from influence.selection import Rule, Selection, pick
from influence.table_selection import Selected

DRAWS = 100
LEVEL = 0.90
# Of the members expected among the unknown rows, this part may be among those that are not drawn.
_NEGLIGIBLE = 1e-4
# Probabilities are added up in units of this.
_UNIT = 2.0**40


@dataclass(frozen=True)
class Membership:
    """What is believed of the selection that all exact scores would give.

    Attributes:
        probability: that a row is a member; exact rows have none (0).
        recall: in each draw, the part of the drawn selection that has exact scores.
        named_recall: the same for the best rows by each name's own score.
    """

    probability: Float[np.ndarray, " n"]
    recall: Float[np.ndarray, " d"]
    named_recall: Float[np.ndarray, "d names"]


def interval(draws: Float[np.ndarray, " d"]) -> tuple[float, float, float]:
    """(mean, low, high) of a recall's draws: what is expected, and its 90 % interval."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(draws.mean()), float(low), float(high)


def membership(
    rule: Rule,
    table: ScoreTable,
    exact: Bool[np.ndarray, " n"],
    calibration: Calibration,
    *,
    selected: Selected,
    named: Float[np.ndarray, "m names"],
    seed: int,
    draws: int = DRAWS,
) -> Membership:
    """Draw the unknown scores and select, `draws` times.

    The table holds exact scores and, for the other rows, the posterior mean with its variance in
    units of the squared scale. The errors of one row are correlated between targets, those of
    different rows are drawn independently; the scale is drawn anew each time, as its estimate from
    l residuals is uncertain (a chi-squared of l). `selected` is what the rule selects of the table.

    A probability is the frequency over the draws, joined as one further draw by the probability to
    exceed the draws' mean threshold: so rows that no draw selected keep an order. `named` turns
    scores per column into scores per name.
    """
    k = len(selected.selection.order)
    tau = _thresholds(rule, selected.selection)
    heads = read_heads(table, lambda P: P @ named, np.full((named.shape[1], 1), k))
    of_names = [np.array([head.scores.min()]) for (head,) in heads]
    tails = _Tails(rule, calibration, named, tau, selected.selection.group, of_names, exact)
    drawn = _plausible(table, tails)
    if not drawn.size:
        return Membership(np.zeros(table.size), np.ones(draws), np.ones((draws, named.shape[1])))
    # What is neither known nor plausible is no member in any draw: the rule need not see it.
    seen = np.unique(np.concatenate([drawn, np.flatnonzero(exact), selected.selection.order]))
    P, variance = rows_of(table, seen)
    there = ~np.isnan(P[:, 0])  # an exact row may have no score after all
    seen, P, variance = seen[there], P[there], variance[there]
    place, known = np.searchsorted(seen, drawn), exact[seen]
    count, recall = np.zeros(len(seen)), np.empty(draws)
    named_recall = np.empty((draws, named.shape[1]))
    mean_tau = np.zeros(())
    rng = np.random.Generator(np.random.PCG64([seed, table.size, int(exact.sum())]))
    for d, sample in enumerate(_samples(P, variance, place, calibration, rng, draws)):
        member = pick(rule, sample, selected.terms, seen)
        rows = np.searchsorted(seen, member.order)
        count[rows] += 1
        recall[d] = known[rows].mean()
        named_recall[d] = _named_recall(sample @ named, known, k)
        mean_tau = mean_tau + _thresholds(rule, member) / draws
    group = selected.selection.group
    above = _row_thresholds(mean_tau, None if group is None else group[drawn])
    tail = exceeding(P[place], variance[place], calibration, rule.decides(), above)
    probability = np.zeros(table.size)
    probability[drawn] = (count[place] + tail) / (draws + 1)
    return Membership(probability, recall, named_recall)


@dataclass(frozen=True)
class _Tails:
    """The probability of unknown rows to exceed the selection's and every name's threshold."""

    rule: Rule
    calibration: Calibration
    named: Float[np.ndarray, "m names"]
    tau: np.ndarray
    group: Int[np.ndarray, " n"] | None
    of_names: Sequence[Float[np.ndarray, " 1"]]
    exact: Bool[np.ndarray, " n"]

    def __call__(
        self, block: ScoreBlock
    ) -> tuple[Int[np.ndarray, " u"], Float[np.ndarray, "u likelies"]]:
        """(positions of the block's unknown rows, their probabilities)."""
        unknown = ~self.exact[block.positions] & ~np.isnan(block.P[:, 0])
        rows, P, variance = block.positions[unknown], block.P[unknown], block.variance[unknown]
        above = _row_thresholds(self.tau, None if self.group is None else self.group[rows])
        columns = [exceeding(P, variance, self.calibration, self.rule.decides(), above)]
        for column, tau in zip(self.named.T[:, :, None], self.of_names, strict=True):
            columns.append(exceeding(P, variance, self.calibration, column, tau))
        return rows, np.stack(columns, axis=1)


def _samples(
    P: Float[np.ndarray, "n m"],
    variance: Float[np.ndarray, " n"],
    drawn: Int[np.ndarray, " b"],
    calibration: Calibration,
    rng: np.random.Generator,
    draws: int,
) -> Iterator[Float[np.ndarray, "n m"]]:
    """P with the scores of some rows drawn, again and again; the array is reused."""
    spread = np.linalg.cholesky(calibration.correlation).T * calibration.scale
    deviation = np.sqrt(variance[drawn])[:, None]
    sample = P.copy()
    for _ in range(draws):
        widen = np.sqrt(calibration.rows / rng.chisquare(calibration.rows))
        noise = rng.standard_normal((len(drawn), P.shape[1])) @ spread
        sample[drawn] = P[drawn] + widen * deviation * noise
        yield sample


def _plausible(table: ScoreTable, tails: _Tails) -> Int[np.ndarray, " b"]:
    """The rows that hold all but a negligible part of the expected members, in order.

    Those whose probability exceeds what each row may be left out with. Totals are sums of whole
    numbers, so that they do not depend on the blocks.
    """
    totals, unknown = 0, 0
    for block in table.blocks():
        rows, probability = tails(block)
        totals = totals + np.floor(probability * _UNIT).astype(np.int64).sum(axis=0)
        unknown += len(rows)
    if not unknown:
        return np.empty(0, dtype=np.int64)
    least = _NEGLIGIBLE * np.asarray(totals, dtype=np.float64) / _UNIT / unknown
    found = []
    for block in table.blocks():
        rows, probability = tails(block)
        found.append(rows[(probability > least).any(axis=1)])
    return np.concatenate(found)


def _named_recall(
    scores: Float[np.ndarray, "n names"], exact: Bool[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " names"]:
    """The part of the k best rows by each column that has exact scores."""
    order = np.where(np.isnan(scores), -np.inf, scores)
    head = np.argpartition(-order, k - 1, axis=0)[:k]
    return exact[head].mean(axis=0)


def reaches(
    rule: Rule,
    selected: Selection,
    P: Float[np.ndarray, "r m"],
    positions: Int[np.ndarray, " r"],
) -> Bool[np.ndarray, " r"]:
    """Which of these rows have a deciding score at the selection's threshold or above."""
    mixed, tau = P @ rule.decides(), _own_thresholds(rule, selected, positions)
    # A sum of columns may differ from the rule's own in its last bits.
    near = (mixed >= tau) | np.isclose(mixed, tau, rtol=1e-9, atol=0.0)
    return np.asarray(near.any(axis=1))


def on_threshold(rule: Rule, selected: Selected) -> Int[np.ndarray, " t"]:
    """The rows that hold the selection's thresholds: the best ones that were not selected."""
    tau = _own_thresholds(rule, selected.selection, selected.rows)
    close = np.isclose(selected.P @ rule.decides(), tau, rtol=1e-9, atol=0.0).any(axis=1)
    return np.setdiff1d(selected.rows[close], selected.selection.order)


def _own_thresholds(
    rule: Rule, selected: Selection, positions: Int[np.ndarray, " r"]
) -> np.ndarray:
    group = None if selected.group is None else selected.group[positions]
    return _row_thresholds(_thresholds(rule, selected), group)


def _thresholds(rule: Rule, selected: Selection) -> np.ndarray:
    """What deciding scores have to exceed: (c,), or (g, c) with quotas."""
    width = rule.decides().shape[1]
    tau = np.asarray(selected.tau, dtype=np.float64)
    tau = tau.T if selected.group is not None else tau
    return np.broadcast_to(tau, (*tau.shape[:-1], width))


def _row_thresholds(tau: np.ndarray, group: Int[np.ndarray, " r"] | None) -> np.ndarray:
    """(c,), or with quotas the thresholds of each row's group (r, c)."""
    return tau if group is None else tau[group]


def exceeding(
    P: Float[np.ndarray, "b m"],
    variance: Float[np.ndarray, " b"],
    calibration: Calibration,
    mix: Float[np.ndarray, "m c"],
    threshold: np.ndarray,
) -> Float[np.ndarray, " b"]:
    """The probability that one of P @ mix exceeds its threshold, the columns taken as independent.

    threshold: (c,), or (b, c).
    """
    scaled = mix * calibration.scale[:, None]
    deviation = np.sqrt(np.einsum("mc,mk,kc->c", scaled, calibration.correlation, scaled))
    unit = np.sqrt(variance)[:, None] * np.maximum(deviation, np.finfo(float).tiny)
    return -np.expm1(log_ndtr((threshold - P @ mix) / unit).sum(axis=1))
