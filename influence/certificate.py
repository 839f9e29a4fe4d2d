"""The certificate of a run: what leave-one-out predictions say of every target and the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.special import ndtri

from influence.certified_result import RecallCertificate
from influence.fidelity import SCORE_LEVEL, certify, sketch_sd
from influence.records import Fidelity, Interval, Recall, TargetFidelity
from influence.scores import Scores
from influence.selection import Selection, combined_score
from influence.target_columns import TargetColumns


def certificate_of(
    scores: Scores,
    selection: Selection,
    columns: TargetColumns,
    *,
    method: str,
    combine: str,
    seed: int,
    landmark_choice: str | None = None,
    recall: RecallCertificate | None = None,
) -> Fidelity:
    """`fidelity.json` of a run. Where nothing was predicted, only the sketch's noise is stated.

    Every landmark counts alike (those of `scores.calibration`, if given), which is right for a
    choice in which every row is drawn with (nearly) the same probability; `landmark_choice` says in
    words which one it was. `recall` takes the place of what leave-one-out says of the recall.
    """
    if scores.loo is None:
        return _exact_certificate(scores, columns, method)
    Y, loo = named_scores(scores, columns)
    decides = deciding_score(selection, columns, combine)
    gradients = len(scores.exact_positions)
    share = min(1.0, len(selection.order) / selection.n_scored)
    mix = columns.named()
    per_name = certify(
        Y,
        loo,
        n=selection.n_scored,
        share=share,
        halves=None if scores.halves is None else scores.halves @ mix,
        loo_halves=None if scores.loo_halves is None else scores.loo_halves @ mix,
        calibration=scores.calibration,
        seed=seed,
    )
    if recall is not None:
        return _certified(per_name, recall, selection, scores, columns, method, landmark_choice)
    # The maximum over columns of a half is biased, so the whole is certified without the halves:
    # recall, the only thing read from it, does not use them.
    whole = certify(
        decides(scores.exact_scores)[:, None],
        decides(scores.loo)[:, None],
        n=selection.n_scored,
        share=share,
        seed=seed,
    )[0]
    return Fidelity(
        method=method,
        exact=False,
        landmarks=gradients,
        landmark_choice=landmark_choice,
        recall=_target_fidelity(whole, gradients).recall,
        targets={
            name: _target_fidelity(certificate, gradients)
            for name, certificate in zip(columns.names, per_name, strict=True)
        },
    )


def _certified(
    per_name: Sequence[Any],
    recall: RecallCertificate,
    selection: Selection,
    scores: Scores,
    columns: TargetColumns,
    method: str,
    landmark_choice: str | None,
) -> Fidelity:
    targets = {}
    for name, certificate, of_name in zip(columns.names, per_name, recall.named, strict=True):
        targets[name] = _target_fidelity(certificate, of_name.exact_gradients)
        targets[name].recall = of_name
    return Fidelity(
        method=method,
        exact=False,
        landmarks=len(scores.exact_positions),
        landmark_choice=landmark_choice,
        recall=recall.selection,
        targets=targets,
        estimated=int(np.count_nonzero(~scores.exact[selection.order])),
        rounds=recall.rounds,
        reliability=recall.reliability,
    )


def named_scores(scores: Scores, columns: TargetColumns) -> tuple[np.ndarray, np.ndarray]:
    """(exact, leave-one-out predicted) scores of the landmarks per name (r x names)."""
    if scores.loo is None:
        raise ValueError("nothing was predicted: there are no leave-one-out scores")
    mix = columns.named()
    return scores.exact_scores @ mix, scores.loo @ mix


def _exact_certificate(scores: Scores, columns: TargetColumns, method: str) -> Fidelity:
    fidelity = Fidelity(method=method, exact=True)
    mix = columns.named()
    for j, name in enumerate(columns.names):
        target = TargetFidelity(recall=Recall(exact_gradients=len(scores.exact_positions)))
        if scores.halves is not None:
            target.sketch_sd = sketch_sd(scores.halves @ mix[:, j])
            target.landmark_halfwidth = float(ndtri(0.5 + SCORE_LEVEL / 2)) * target.sketch_sd
        fidelity.targets[name] = target
    return fidelity


def _target_fidelity(certificate: Any, gradients: int) -> TargetFidelity:
    values = asdict(certificate)
    return TargetFidelity(
        recall=Recall(**values["recall"], exact_gradients=gradients),
        spearman=Interval(**values["spearman"]),
        r2=values["r2"],
        score_halfwidth=values["score_halfwidth"],
        landmark_halfwidth=values["landmark_halfwidth"],
        sketch_sd=values["sketch_sd"],
        reliability=values["reliability"],
    )


def deciding_score(
    selection: Selection, columns: TargetColumns, combine: str
) -> Callable[[np.ndarray], np.ndarray]:
    """What decides whether a row is selected, as one number per row.

    `mean` and `max`: the combined score. Round robin: the largest margin above a column's
    threshold, max over t of (p_t - tau_t), which is positive for rows that some turn would take.
    """
    if combine != "round_robin":
        return lambda P: combined_score(P, columns.target_of, combine)[0]
    tau = selection.tau if selection.tau.ndim == 1 else selection.tau.max(axis=1)
    return lambda P: (P - tau).max(axis=1)
