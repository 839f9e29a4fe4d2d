"""What a selection looks like: every candidate's columns, and the counts that a summary shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from influence.catalogue import Catalogue
from influence.fidelity import true_fidelity
from influence.schemas import Fidelity
from influence.scores import Scores
from influence.selection import Selection, combined_score
from influence.target_columns import TargetColumns


def score_columns(
    scores: Scores,
    selection: Selection,
    fidelity: Fidelity,
    columns: TargetColumns,
    combine: str,
) -> dict[str, Any]:
    """The columns of `scores/`, one value per candidate: score, target, weight, intervals."""
    score, best = combined_score(scores.P, columns.target_of, combine)
    labels = [column.label for column in columns.columns]
    weight = np.zeros(len(score))
    weight[selection.order] = selection.weights
    found: dict[str, Any] = {
        "score": score,
        "target": [labels[b] if b >= 0 else None for b in best],
        "weight": weight,
        "exact": scores.exact,
    }
    for name, values in zip(columns.names, (scores.P @ columns.named()).T, strict=True):
        certificate = fidelity.targets[name]
        # With too few landmarks the interval of a prediction is unknown: null, not zero.
        predicted = certificate.score_halfwidth
        half = np.where(
            scores.exact,
            certificate.landmark_halfwidth,
            np.nan if predicted is None else predicted,
        )
        found[f"score.{name}"] = values
        found[f"low.{name}"] = values - half
        found[f"high.{name}"] = values + half
    return found


def selected_counts(
    pool: Catalogue, selection: Selection, columns: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Rows selected, how many equal weights theirs amount to, and each name's length bias."""
    eligible = pool.eligible
    lengths = pool.n_response_tokens[eligible].astype(float)
    weights = selection.weights / selection.weights.sum()
    return {
        "selected": len(selection.order),
        "budget_exceeds_pool": selection.budget_exceeds_pool,
        "length_spearman": {
            name: true_fidelity(columns[f"score.{name}"][eligible], lengths, 1).spearman
            for name in names
        },
        "effective_rows": float(1.0 / np.square(weights).sum()),
    }


def source_counts(pool: Catalogue, selection: Selection) -> dict[str, tuple[int, int]]:
    """Source -> (rows that can be scored, rows selected)."""
    before = Counter(pool.sources[position] for position in pool.eligible)
    after = Counter(pool.sources[position] for position in selection.order)
    return {name: (before[name], after.get(name, 0)) for name in before}
