"""Predicted scores against known ones over a grid of settings: is the certificate honest?

The rows all have exact scores. A few of them, drawn uniformly, are the landmarks of a regression;
its predictions of the other rows are held against their scores, and so is what the certificate
says of them from the landmarks alone. Everything here is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64
from scipy.stats import rankdata

from influence import landmarks
from influence.certified import Certified, Settings, audit_rows, initial_landmarks
from influence.certified_result import recall_certificate
from influence.fidelity import Recall, Spearman, certify
from influence.posterior import believe
from influence.score_table import ArrayTable
from influence.selection import Rule


class Setting(NamedTuple):
    """One regression. embedding: its place among those that are compared."""

    embedding: int
    landmarks: int
    kernel: str
    damping: float


class Trial(NamedTuple):
    """One setting with one draw of landmarks; a number for every column of the scores.

    Attributes:
        spearman: with the truth over the rows that are no landmarks; NaN where a side is constant.
        recall: of the pool's best rows, landmarks being ranked by their exact scores; (tops x
            columns).
        stated: what the certificate says of the last `len(stated)` columns.
    """

    spearman: Float[np.ndarray, " c"]
    recall: Float[np.ndarray, "t c"]
    stated: list[tuple[Spearman, Recall]]


class Played(NamedTuple):
    """Certified rounds: the true recall of the selection, what was stated, and what it took."""

    recall: float
    expected: float
    low: float
    high: float
    audit_low: float | None
    exact: int
    rounds: int


def settings_of(
    own: Setting,
    embeddings: int,
    counts: Sequence[int],
    kernels: Sequence[str],
    damping: Sequence[float],
    *,
    full: bool,
) -> list[Setting]:
    """All combinations, or (a star) those that differ from `own` in one thing; `own` comes first.

    Sorted by the embedding otherwise, each once.
    """
    every = [
        Setting(e, count, kernel, ridge)
        for e in range(embeddings)
        for count in sorted({*counts, own.landmarks})
        for kernel in dict.fromkeys([*kernels, own.kernel])
        for ridge in sorted({*damping, own.damping})
    ]
    apart = {each: sum(a != b for a, b in zip(each, own, strict=True)) for each in every}
    return [own, *(each for each in every if each != own and (full or apart[each] == 1))]


def try_setting(
    X: Float[np.ndarray, "n e"],
    Y: Float[np.ndarray, "n c"],
    chosen: Int[np.ndarray, " l"],
    *,
    kernel: str,
    damping: float,
    tops: Sequence[int],
    stated: int,
    share: float,
    seed: int,
    pool: int,
) -> Trial:
    """Fit on the chosen rows and hold the predictions of the others against their scores.

    The rows are a sample of a pool of `pool` rows, where the landmarks are but themselves and the
    others stand for all the rest: a recall is that of the same number of landmarks in the pool.

    tops: numbers of best rows of the sample whose recall is taken, as that part of the pool.
    stated: the last so many columns get a certificate, for the best `share`.

    Raises InputError for fewer than 4 landmarks, or a singular kernel.
    """
    model = landmarks.fit(X[chosen], Y[chosen], kernel=kernel, damping=damping)
    P = landmarks.predict(model, X)
    rest = np.setdiff1d(np.arange(len(X)), chosen)
    spearman = rank_correlations(P[rest], Y[rest])
    P[chosen] = Y[chosen]
    stands_for = np.ones(len(X))
    stands_for[rest] = (pool - len(chosen)) / len(rest)
    recall = np.stack([recalls(P, Y, stands_for, top / len(X)) for top in tops])
    first = Y.shape[1] - stated
    y, loo = Y[chosen, first:], model.loo_predictions[:, first:]
    # The truth is known of the sample alone, which widens a Spearman's interval.
    here = certify(y, loo, n=len(X), share=share, seed=seed)
    there = here if pool == len(X) else certify(y, loo, n=pool, share=share, seed=seed)
    claims = [(a.spearman, b.recall) for a, b in zip(here, there, strict=True)]
    return Trial(spearman, recall, claims)


def rank_correlations(
    A: Float[np.ndarray, "n c"], B: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, " c"]:
    """Spearman of each column of A with that of B, ties at their mean rank; NaN for a constant."""
    a, b = (rankdata(x, axis=0) - (len(x) + 1) / 2 for x in (A, B))
    scale = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
    found = np.full(A.shape[1], np.nan)
    np.divide((a * b).sum(axis=0), scale, out=found, where=scale > 0)
    return found


def recalls(
    P: Float[np.ndarray, "n c"],
    Y: Float[np.ndarray, "n c"],
    weights: Float[np.ndarray, " n"],
    share: float,
) -> Float[np.ndarray, " c"]:
    """The part of the best `share` of the weight by Y that is in the best share by P.

    Ties go by position. A row on the boundary counts with the part of it that lies inside; with
    weights of 1 this is the recall of the best share * n rows.
    """
    top = share * weights.sum()
    inside = np.empty((2, *Y.shape))
    for place, scores in enumerate((P, Y)):
        order = np.argsort(-scores, axis=0, kind="stable")
        own = weights[order]
        head = np.clip(top - (np.cumsum(own, axis=0) - own), 0.0, own)
        np.put_along_axis(inside[place], order, head, axis=0)
    return inside.min(axis=0).sum(axis=0) / top


def play(
    X: Float[np.ndarray, "n e"],
    Y: Float[np.ndarray, "n m"],
    rule: Rule,
    named: Float[np.ndarray, "m names"],
    *,
    keys: tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]],
    settings: Settings,
) -> Played:
    """The rounds that a certified run would go through on these rows, and how right it would be.

    keys: that draw the first landmarks, and the audit.
    """
    rounds = Certified(rule, named, keys[1], settings)
    rows = landmarks.choose_uniform(keys[0], initial_landmarks(len(X), settings.count, None))
    while True:
        rounds.add(rows, X[rows], Y[rows], None)
        believed = ArrayTable(*believe(rounds.fit(), X))
        step = rounds.next_step(believed, np.empty(0, dtype=np.int64))
        if step.kind == "done":
            break
        rows = step.rows
    claim = recall_certificate(rounds)
    stated, truth = claim.selection, rule(Y).order
    assert rounds.selected is not None
    found = float(np.isin(truth, rounds.selected.selection.order).mean())
    assert stated.expected is not None
    assert stated.low is not None
    assert stated.high is not None
    limits = (stated.expected, stated.low, stated.high)
    return Played(found, *limits, stated.audit_low, int(rounds.exact.sum()), len(claim.rounds))


def play_settings(n: int, recall: float, kernel: str, damping: float, seed: int) -> Settings:
    """Of rounds that may look at every one of n rows; the audit is at most a tenth of them."""
    audit = min(audit_rows(n, None), ceil(n / 10))
    return Settings(recall, n, audit, kernel, damping, seed)
