"""The columns of the score matrix: one per target, per group of a target, or per target row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from influence.candidates import SourceFile, none_usable
from influence.catalogue import NO_SOURCE, Catalogue
from influence.errors import InputError


@dataclass(frozen=True)
class Column:
    """One column: the mean over some rows of one target.

    Attributes:
        target: the target's name.
        label: the target's name, TARGET/GROUP, or TARGET:ROW ID; what `target` holds in scores.
        rows: positions in the target's catalogue.
    """

    target: str
    label: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class TargetColumns:
    """All columns of a run, targets in config order.

    Attributes:
        columns: the columns of the score matrix.
        names: what gets a `score.NAME` column: targets, then the groups of each.
    """

    columns: tuple[Column, ...]
    names: tuple[str, ...]

    @property
    def target_of(self) -> Int[np.ndarray, "m"]:
        """Index of each column's target, in the order of appearance."""
        order = {name: i for i, name in enumerate(dict.fromkeys(c.target for c in self.columns))}
        return np.asarray([order[column.target] for column in self.columns])

    def named(self) -> Float[np.ndarray, "m names"]:
        """Matrix that turns scores per column into scores per name (means over columns)."""
        mix = np.zeros((len(self.columns), len(self.names)))
        for j, name in enumerate(self.names):
            members = [i for i, c in enumerate(self.columns) if name in (c.label, c.target)]
            mix[members, j] = 1.0 / len(members)
        return mix


def target_columns(
    catalogues: Mapping[str, Catalogue], per: Mapping[str, str], grouped: Mapping[str, bool]
) -> TargetColumns:
    """Columns of every target: `per` is "row" or "group", `grouped` whether it has a group column.

    Raises:
        InputError: a target none of whose rows can be scored.
    """
    columns: list[Column] = []
    names: list[str] = []
    for target, catalogue in catalogues.items():
        usable = [int(position) for position in catalogue.eligible]
        if not usable:
            raise none_usable(f"targets.{target}", catalogue.files, catalogue.reasons())
        names.append(target)
        if grouped[target]:
            groups: dict[str, list[int]] = {}
            for position in usable:
                groups.setdefault(catalogue.groups[position] or NO_SOURCE, []).append(position)
            for group in sorted(groups):
                label = f"{target}/{group}"
                names.append(label)
                columns.append(Column(target, label, tuple(groups[group])))
        elif per[target] == "group":
            columns.append(Column(target, target, tuple(usable)))
        else:
            columns += [
                Column(target, f"{target}:{catalogue.ids[position]}", (position,))
                for position in usable
            ]
    return TargetColumns(tuple(columns), tuple(names))


def mean_vectors(
    columns: TargetColumns, rows: Mapping[str, Float[np.ndarray, "t d"]]
) -> Float[np.ndarray, "m d"]:
    """Mean vector of each column; `rows` holds each target's vectors by catalogue position."""
    return np.stack(
        [rows[column.target][list(column.rows)].mean(axis=0) for column in columns.columns]
    )


def rows_behind(
    columns: TargetColumns, catalogues: Mapping[str, Catalogue]
) -> dict[str, list[tuple[SourceFile, list[int]]]]:
    """The rows of every column of every target: (file, rows).

    Raises:
        InputError: a column's rows are in several files.
    """
    found: dict[str, list[tuple[SourceFile, list[int]]]] = {}
    for column in columns.columns:
        per_file = catalogues[column.target].by_file(column.rows)
        if len(per_file) > 1:
            raise InputError(
                f"targets.{column.target}: projection: exact needs the rows of "
                f"{column.label!r} in one file; found {len(per_file)}: join the files, or use "
                "projection: kronecker"
            )
        found.setdefault(column.target, []).append(per_file[0])
    return found
