"""The document of the evaluation `fidelity`, and its figures out of the trials behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from influence.fidelity_grid import Played, Setting, Trial


class Figure(BaseModel):
    """Over the draws of landmarks: mean, least and most; None where it is undefined in all."""

    mean: float | None = None
    least: float | None = None
    most: float | None = None


class Stated(BaseModel):
    """What the certificate states of a figure: means over the draws of the value and its interval.

    inside: the part of the draws in which the truth lay in the interval.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    inside: float | None = None


class NameFigures(BaseModel):
    """One target, a group, or the mean of the targets.

    spearman: over the rows that are no landmarks. recall: of the budget's head, over all rows,
    landmarks by their exact scores; recall_5: of the best 5 %.
    """

    spearman: Figure
    stated_spearman: Stated
    recall: Figure
    stated_recall: Stated
    recall_5: Figure


class ColumnFigures(BaseModel):
    """Means over all columns of the scores, target rows and groups, each ranked for itself."""

    spearman: Figure
    recall: Figure
    recall_5: Figure


class SettingFigures(BaseModel):
    """One setting. flops: of a candidate, its part of the landmarks' gradients included."""

    embedding: str
    landmarks: int
    kernel: str
    damping: float
    flops: float
    names: dict[str, NameFigures]
    columns: ColumnFigures


class Certified(BaseModel):
    """Certified rounds on the pilot's rows: the selection's true recall, and what was stated.

    low: the lower end of the stated 90 % interval. above_low: the part of the draws in which the
    truth was not below it. audit_low: of the audit. exact: rows with exact scores in the end.
    """

    embedding: str
    asked: float
    draws: int
    recall: Figure
    stated: Figure
    low: Figure
    above_low: float
    audit_low: Figure
    exact: Figure
    exact_share: float
    rounds: Figure


class EmbeddingCost(BaseModel):
    """Of a candidate: operations, and the model's seconds on a replica; None if all were cached."""

    label: str
    flops: float
    seconds: float | None


class About(BaseModel):
    """pilot: rows with exact scores; pool: candidates that can be scored. share: of them, which the
    budget selects. top: rows of that share of the pilot, and of 5 %. left_out: numbers of landmarks
    that the pilot is too small for."""

    pilot: int
    pool: int
    share: float
    top: list[int]
    columns: int
    names: list[str]
    design: str
    repeats: int
    left_out: list[int]
    gradient_flops: float
    gradient_seconds: float | None
    projection: str
    model: str
    adapter: str | None


class Fidelity(BaseModel):
    """The document of evaluation.json; the first setting is the config's own."""

    settings: list[SettingFigures] = Field(min_length=1)
    certified: list[Certified]
    embeddings: list[EmbeddingCost]
    about: About


def figure(values: Sequence[float | None]) -> Figure:
    """Of the values that are there."""
    there = [float(v) for v in values if v is not None and np.isfinite(v)]
    if not there:
        return Figure()
    return Figure(mean=sum(there) / len(there), least=min(there), most=max(there))


def stated(truth: Sequence[float], claims: Sequence[Any], key: str) -> Stated:
    """Of one claim a draw, whose value is the attribute `key`."""
    made = [
        (t, getattr(claim, key), claim.low, claim.high)
        for t, claim in zip(truth, claims, strict=True)
        if getattr(claim, key) is not None and np.isfinite(t)
    ]
    if not made:
        return Stated()
    value, low, high = (float(np.mean([each[place] for each in made])) for place in (1, 2, 3))
    inside = float(np.mean([low <= t <= high for t, _value, low, high in made]))
    return Stated(value=value, low=low, high=high, inside=inside)


def setting_figures(
    setting: Setting, label: str, flops: float, trials: Sequence[Trial], names: Sequence[str]
) -> SettingFigures:
    """Out of one trial for every draw; the last columns are those of the names."""
    first = trials[0].recall.shape[1] - len(names)
    found = {}
    for place, name in enumerate(names):
        column = first + place
        spearman = [float(trial.spearman[column]) for trial in trials]
        recall, recall_5 = (
            [float(trial.recall[top, column]) for trial in trials] for top in (0, 1)
        )
        claims = [trial.stated[place] for trial in trials]
        found[name] = NameFigures(
            spearman=figure(spearman),
            stated_spearman=stated(spearman, [claim[0] for claim in claims], "value"),
            recall=figure(recall),
            stated_recall=stated(recall, [claim[1] for claim in claims], "expected"),
            recall_5=figure(recall_5),
        )
    columns = ColumnFigures(
        spearman=figure([_mean(trial.spearman[:first]) for trial in trials]),
        recall=figure([_mean(trial.recall[0, :first]) for trial in trials]),
        recall_5=figure([_mean(trial.recall[1, :first]) for trial in trials]),
    )
    return SettingFigures(
        embedding=label,
        landmarks=setting.landmarks,
        kernel=setting.kernel,
        damping=setting.damping,
        flops=flops,
        names=found,
        columns=columns,
    )


def _mean(values: np.ndarray) -> float | None:
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else None


def certified_figures(label: str, asked: float, played: Sequence[Played], rows: int) -> Certified:
    """Out of the rounds of every draw."""
    exact = figure([each.exact for each in played])
    assert exact.mean is not None
    return Certified(
        embedding=label,
        asked=asked,
        draws=len(played),
        recall=figure([each.recall for each in played]),
        stated=figure([each.expected for each in played]),
        low=figure([each.low for each in played]),
        above_low=float(np.mean([each.recall >= each.low for each in played])),
        audit_low=figure([each.audit_low for each in played]),
        exact=exact,
        exact_share=exact.mean / rows,
        rounds=figure([each.rounds for each in played]),
    )
