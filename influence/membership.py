"""Which rows belong to the selection that all exact scores would give, and how surely.

Scores that are not known are drawn from the posterior many times, and each time the selection rule
in use is applied to the whole. So every budget, combination of targets and quota is judged by what
it does, and the recall that is stated comes with its distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import norm

from influence.posterior import Calibration
from influence.selection import Rule, Selection

DRAWS = 100
LEVEL = 0.90
# Of the members expected among the unknown rows, this part may be among those that are not drawn.
_NEGLIGIBLE = 1e-4


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
    P: Float[np.ndarray, "n m"],
    variance: Float[np.ndarray, " n"],
    exact: Bool[np.ndarray, " n"],
    calibration: Calibration,
    *,
    named: Float[np.ndarray, "m names"],
    seed: int,
    draws: int = DRAWS,
) -> Membership:
    """Draw the unknown scores and select, `draws` times.

    P holds exact scores and, for the other rows, the posterior mean (NaN: a row without scores);
    `variance` is the posterior's, in units of the squared scale. The errors of one row are
    correlated between targets, those of different rows are drawn independently; the scale is drawn
    anew each time, as its estimate from l residuals is uncertain (a chi-squared of l).

    A probability is the frequency over the draws, joined as one further draw by the probability to
    exceed the draws' mean threshold: so rows that no draw selected keep an order. `named` turns
    scores per column into scores per name.
    """
    selected = rule(P)
    k, mix = len(selected.order), rule.decides()
    rest = np.flatnonzero(~exact & ~np.isnan(P[:, 0]))
    tau = _thresholds(rule, selected)
    likely = [_tail(P, variance, calibration, mix, tau, rest)]
    for column in named.T[:, :, None]:
        likely.append(_tail(P, variance, calibration, column, _kth(P @ column, k), rest))
    drawn = np.unique(np.concatenate([_plausible(rest, tail) for tail in likely]))
    if not drawn.size:
        return Membership(np.zeros(len(P)), np.ones(draws), np.ones((draws, named.shape[1])))
    # What is neither known nor plausible is no member in any draw: the rule need not see it.
    seen = np.unique(np.concatenate([drawn, np.flatnonzero(exact), selected.order]))
    if rule.per_source:
        seen = np.arange(len(P))
    small = rule if rule.per_source else rule.on(seen, k)
    place, known = np.searchsorted(seen, drawn), exact[seen]
    count, recall = np.zeros(len(seen)), np.empty(draws)
    named_recall = np.empty((draws, named.shape[1]))
    tau = np.zeros(())
    rng = np.random.Generator(np.random.PCG64([seed, len(P), int(exact.sum())]))
    for d, sample in enumerate(_samples(P[seen], variance[seen], place, calibration, rng, draws)):
        member = small(sample)
        count[member.order] += 1
        recall[d] = known[member.order].mean()
        named_recall[d] = _named_recall(sample @ named, known, k)
        tau = tau + _thresholds(small, member) / draws
    tail = _tail(P[seen], variance[seen], calibration, mix, tau, place)
    probability = np.zeros(len(P))
    probability[drawn] = (count[place] + tail) / (draws + 1)
    return Membership(probability, recall, named_recall)


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


def _plausible(
    rows: Int[np.ndarray, " u"], probability: Float[np.ndarray, " u"]
) -> Int[np.ndarray, " b"]:
    """The rows that hold all but a negligible part of the expected members, in order."""
    order = np.argsort(-probability, kind="stable")
    held = np.cumsum(probability[order])
    total = float(held[-1]) if len(held) else 0.0
    if total <= 0:
        return np.empty(0, dtype=np.int64)
    return np.sort(rows[order[: int(np.searchsorted(held, (1 - _NEGLIGIBLE) * total)) + 1]])


def _named_recall(
    scores: Float[np.ndarray, "n names"], exact: Bool[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " names"]:
    """The part of the k best rows by each column that has exact scores."""
    order = np.where(np.isnan(scores), -np.inf, scores)
    head = np.argpartition(-order, k - 1, axis=0)[:k]
    return exact[head].mean(axis=0)


def _kth(scores: Float[np.ndarray, "n 1"], k: int) -> Float[np.ndarray, " 1"]:
    """The k-th largest score."""
    there = scores[~np.isnan(scores)]
    return np.partition(there, len(there) - k)[len(there) - k : len(there) - k + 1]


def reaches(rule: Rule, selected: Selection, P: Float[np.ndarray, "n m"]) -> Bool[np.ndarray, " n"]:
    """Which rows have a deciding score at the selection's threshold or above (NaN: no)."""
    mixed = P @ rule.decides()
    tau = _thresholds(rule, selected)
    # A sum of columns may differ from the rule's own in its last bits.
    near = (mixed >= tau) | np.isclose(mixed, tau, rtol=1e-9, atol=0.0)
    return np.asarray(near.any(axis=1))


def on_threshold(
    rule: Rule, selected: Selection, P: Float[np.ndarray, "n m"]
) -> Bool[np.ndarray, " n"]:
    """Which rows hold the selection's thresholds: the best ones that were not selected."""
    close = np.isclose(P @ rule.decides(), _thresholds(rule, selected), rtol=1e-9, atol=0.0)
    held = np.asarray(close.any(axis=1))
    held[selected.order] = False
    return held


def _thresholds(rule: Rule, selected: Selection) -> np.ndarray:
    """What a row's deciding scores have to exceed: (c,), or (n, c) with quotas."""
    width = rule.decides().shape[1]
    tau = np.asarray(selected.tau, dtype=np.float64)
    if selected.group is not None:
        tau = tau[:, selected.group].T
    return np.broadcast_to(tau, (*tau.shape[:-1], width))


def _tail(
    P: Float[np.ndarray, "n m"],
    variance: Float[np.ndarray, " n"],
    calibration: Calibration,
    mix: Float[np.ndarray, "m c"],
    threshold: np.ndarray,
    rows: Int[np.ndarray, " b"],
) -> Float[np.ndarray, " b"]:
    """The probability that one of P @ mix exceeds its threshold, the columns taken as independent.

    threshold: (c,), or (n, c).
    """
    scaled = mix * calibration.scale[:, None]
    deviation = np.sqrt(np.einsum("mc,mk,kc->c", scaled, calibration.correlation, scaled))
    unit = np.sqrt(variance[rows])[:, None] * np.maximum(deviation, np.finfo(float).tiny)
    tau = threshold if threshold.ndim == 1 else threshold[rows]
    below = (tau - P[rows] @ mix) / unit
    return -np.expm1(norm.logcdf(below).sum(axis=1))
