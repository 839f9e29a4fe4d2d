"""What the driver and the reducer hand each other in the second order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from influence.candidates import SourceFile
from influence.catalogue import Catalogue
from influence.config_weights import WeightsConfig
from influence.errors import InputError
from influence.target_columns import TargetColumns
from influence.units import Unit

Along = Mapping[str, Sequence[Unit]]
"""By target the units with its rows' products with the optimiser's offset."""


@dataclass(frozen=True)
class TargetRow:
    """A target row: its target, its position there, and its share of the mean target loss."""

    target: str
    position: int
    share: float


@dataclass(frozen=True)
class DirectionPlan:
    """What the directions' full vectors are made of: landmarks' rows, and weights over them.

    keys: of each direction's weights, over the rows in their order. targets: the rows of the mean
    target loss in parts of equal shares (file, rows, the part's share of the whole).
    """

    rows: list[tuple[SourceFile, list[int]]]
    keys: list[str]
    targets: list[tuple[SourceFile, list[int], float]]


@dataclass(frozen=True)
class MadeVectors:
    """Keys of the directions' shards (last, if there is one, the offset's), and for each of them
    those of the Hessian's products with it: one for each part of the target rows, with its share.
    """

    directions: list[str]
    products: list[list[tuple[str, float]]]


def check_covariance(weights: WeightsConfig, columns: TargetColumns) -> None:
    """Before anything is computed: one row's gradient has no covariance.

    Raises InputError for `fisher` in the second order with fewer than two target rows.
    """
    rows = sum(len(column.rows) for column in columns.columns)
    if weights.order == 2 and weights.curvature == "fisher" and rows < 2:
        raise InputError(
            f"weights.curvature: fisher is the covariance of the target rows' gradients, and "
            f"{rows} target row can be scored; expected at least 2: add rows to a target, or use "
            "weights.curvature: hvp"
        )


def row_shares(columns: TargetColumns) -> list[TargetRow]:
    """Every target row in the order of the columns, with its share of what `mean` combines.

    The combined score is the mean over targets of the mean over a target's columns, each the mean
    over its rows.
    """
    counts = Counter(column.target for column in columns.columns)
    return [
        TargetRow(
            column.target,
            position,
            1.0 / (len(counts) * counts[column.target] * len(column.rows)),
        )
        for column in columns.columns
        for position in column.rows
    ]


def target_parts(
    columns: TargetColumns, targets: Mapping[str, Catalogue]
) -> list[tuple[SourceFile, list[int], float]]:
    """The target rows in few parts, each of one file and with one share for each row."""
    alike: dict[tuple[str, float], list[int]] = {}
    for row in row_shares(columns):
        alike.setdefault((row.target, row.share), []).append(row.position)
    return [
        (file, rows, share * len(rows))
        for (name, share), positions in alike.items()
        for file, rows in targets[name].by_file(np.sort(positions))
    ]
