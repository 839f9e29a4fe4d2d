"""What a certified run hands out: its scores, and how sure the recall is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from influence.audit import Found, missed_at_most
from influence.certified import Certified
from influence.membership import interval, reaches
from influence.posterior import leave_one_out, no_evidence, observe, posterior_of
from influence.records import Recall, ReliabilityBin, Round
from influence.scores import Scores

# Predicted probabilities are grouped by these for the reliability.
EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)


class RecallCertificate(NamedTuple):
    """The recall of the selection and of each name's best rows, and how it was reached."""

    selection: Recall
    named: list[Recall]
    rounds: list[Round]
    reliability: list[ReliabilityBin]


def certified_scores(certified: Certified) -> Scores:
    """The pool's scores, and the leave-one-out predictions of the exact rows."""
    known, posterior = certified.known, certified.posterior
    assert known is not None
    assert posterior is not None
    order = np.argsort(known.positions)
    loo = known.Y - leave_one_out(posterior, known.X, known.Y).residuals
    halves = known.halves
    assert certified.table is not None
    return Scores(
        table=certified.table,
        exact=certified.exact,
        exact_positions=known.positions[order],
        exact_scores=known.Y[order],
        loo=loo[order],
        halves=None if halves is None else halves[:, order],
        loo_halves=None if halves is None else _loo_halves(certified, halves)[:, order],
        calibration=(np.arange(len(order)) < known.uniform)[order],
    )


def _loo_halves(
    certified: Certified, halves: Float[np.ndarray, "2 l m"]
) -> Float[np.ndarray, "2 l m"]:
    """What the process would say of each exact row, had it seen one half of the sketches alone."""
    known, posterior = certified.known, certified.posterior
    assert known is not None
    assert posterior is not None
    before = posterior.evidence
    Y = np.concatenate([*halves], axis=1)
    mean = Y[: known.uniform].mean(axis=0)
    evidence = no_evidence(before.features, ridge=before.ridge, mean=mean)
    of_halves = posterior_of(observe(evidence, known.X, Y))
    loo = Y - leave_one_out(of_halves, known.X, Y).residuals
    return np.stack(np.split(loo, 2, axis=1))


def recall_certificate(certified: Certified) -> RecallCertificate:
    """Interval of the model, bound of the audit, and the way there."""
    belief = certified.belief
    assert belief is not None
    bounds = audit_bounds(certified)
    count = int(certified.exact.sum())

    def recall(draws: Float[np.ndarray, " d"], audit_low: float | None) -> Recall:
        expected, low, high = interval(draws)
        return Recall(
            expected=expected,
            low=low,
            high=high,
            audit_low=audit_low,
            exact_gradients=count,
        )

    named_bounds = [None] * belief.named_recall.shape[1] if bounds is None else bounds.named
    return RecallCertificate(
        recall(belief.recall, None if bounds is None else bounds.selection),
        [
            recall(draws, low)
            for draws, low in zip(belief.named_recall.T, named_bounds, strict=True)
        ],
        certified.rounds,
        reliability(certified),
    )


class AuditBounds(NamedTuple):
    """Lower 95 % bounds of the recall: of the selection, and of each name's best rows.

    `selection` is None where displaced rows cannot be counted; see `audit_bounds`.
    """

    selection: float | None
    named: list[float]


def audit_bounds(certified: Certified) -> AuditBounds | None:
    """What the audit proves; None where there was none.

    A row that was left out can displace one selected row at most, and only if it reaches the
    threshold that it was held against: M such rows leave a recall of 1 - M/k at least. For `mean`
    and `max` because the selection is the k best rows (with quotas the best basis of a matroid);
    for round robin because a row that is added moves the turns' picks along a chain that
    ends with one row dropped. Round robin with quotas has no such chain (a source may be full
    sooner), and a budget in tokens drops several short rows for a long one: there is no bound of
    the selection then, nor where estimates were selected in the end.
    """
    audit, known, last = certified.audit, certified.known, certified.selected
    if audit is None or known is None or last is None:
        return None
    k, n = len(audit.selected.order), len(certified.keys)
    before = np.isin(known.positions, audit.before)
    of_known = [reaches(certified.rule, audit.selected, known.Y, known.positions)]
    for column in (known.Y @ certified.named).T:
        head = np.sort(column[before])[::-1][:k]
        of_known.append(column >= head[-1] if len(head) == k else np.ones(len(column), bool))
    members = []
    for reached in of_known:
        member = np.zeros(n, dtype=bool)
        member[known.positions[reached]] = True
        members.append(member)
    bounds = []
    for member in members:
        found = [
            Found(len(stratum.rows), stratum.drawn, int(member[sample].sum()), stratum.error)
            for stratum, sample in zip(audit.strata, audit.samples, strict=True)
        ]
        bounds.append(max(0.0, 1.0 - missed_at_most(found) / k))
    rule = certified.rule
    counted = rule.budget.tokens is None and not (rule.combine == "round_robin" and rule.per_source)
    exact = bool(certified.exact[last.selection.order].all())
    return AuditBounds(bounds[0] if counted and exact else None, bounds[1:])


def reliability(certified: Certified) -> list[ReliabilityBin]:
    """Of the rows acquired after the landmarks: predicted probability against observed frequency.

    A row's probability is the one that was stated just before its score became known; whether it is
    a member is decided by the last selection.
    """
    rows = np.fromiter(certified.predicted, np.int64, len(certified.predicted))
    predicted = np.fromiter(certified.predicted.values(), np.float64, len(rows))
    member = np.zeros(len(certified.keys), dtype=bool)
    assert certified.selected is not None
    member[certified.selected.selection.order] = True
    return reliability_bins(predicted, member[rows], EDGES)


def reliability_bins(
    predicted: Float[np.ndarray, " r"], member: Bool[np.ndarray, " r"], edges: Sequence[float]
) -> list[ReliabilityBin]:
    """Predicted probability against observed frequency, in the bins between the edges."""
    place = np.digitize(predicted, edges)
    return [
        ReliabilityBin(
            rows=int(inside.sum()),
            predicted=float(predicted[inside].mean()),
            observed=float(member[inside].mean()),
        )
        for inside in (place == b for b in range(len(edges) + 1))
        if inside.any()
    ]
