"""What `influence evaluate` can measure: one file for each evaluation, and a line in this registry.

An evaluation's name is its key in the config's section `evaluation`, and in RUN/evaluation.json.
"""

from __future__ import annotations

from collections.abc import Mapping

from influence.evaluations import (
    class_detection,
    downstream,
    exact_inverse,
    fidelity,
    group_influence,
    lds,
    leave_one_out,
    reductions,
)
from influence.evaluations.kind import Evaluation, ResultTable

__all__ = ["EVALUATIONS", "Evaluation", "ResultTable"]

EVALUATIONS: Mapping[str, Evaluation] = {
    "class_detection": class_detection.EVALUATION,
    "group_influence": group_influence.EVALUATION,
    "reductions": reductions.EVALUATION,
    "exact_inverse": exact_inverse.EVALUATION,
    "lds": lds.EVALUATION,
    "leave_one_out": leave_one_out.EVALUATION,
    "downstream": downstream.EVALUATION,
    "fidelity": fidelity.EVALUATION,
}
