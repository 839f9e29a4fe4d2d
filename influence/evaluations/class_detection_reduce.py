"""Class detection in the reducer: classes out of the files, and how well each ranking finds them.

Holds two numbers for each candidate, and the scores of some target rows at a time.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from influence.cache import Cache
from influence.candidates import SourceFile, column_names, read_column
from influence.class_detection import MeanError, area_under_curve, mean_error, recall_of_class
from influence.config import Config
from influence.errors import InputError
from influence.gradient_rows import mean_gradients
from influence.predictor import linear_predictor, write_predictor
from influence.reducer import Reducer
from influence.score_shards import ShardTable, scoring_url
from influence.score_table import ScoreTable, scored_rows
from influence.units import ExactUnits, Unit

KEY = "evaluation.class_detection.column"
#: Scores that are held at once: 2^25 float64 are 256 MiB.
_HELD = 1 << 25
_SHOWN = 5
NO_CLASS = "candidates without a class"
NO_SCORE = "candidates without a score"
DUPLICATES = "duplicates among the candidates"
UNKNOWN = "target rows of a class that no candidate has"
ALONE = "target rows of a class that all candidates have"


@dataclass(frozen=True)
class Classes:
    """names of the candidates' classes; of: each candidate's (-1: none), in the order of files and
    rows; targets: the class of every row of each target.
    """

    names: list[str]
    of: Int[np.ndarray, " n"]
    targets: dict[str, list[str | None]]


@dataclass(frozen=True)
class Judged:
    """methods: the means of what `_figures` finds by each; by_class: what `ClassFigures` holds."""

    methods: dict[str, list[MeanError]]
    by_class: dict[str, dict[str, Any]]
    candidates: int
    target_rows: int
    candidates_left_out: dict[str, int]
    target_rows_left_out: dict[str, int]


class ClassDetectionReduce:
    """The select job's reducer, for every step that is its own, and what comes beside those."""

    def __init__(self, config: Config) -> None:
        assert config.evaluation.class_detection is not None
        self._reducer = Reducer(config)
        self._column = config.evaluation.class_detection.column
        self._scoring = scoring_url(config.run)

    def __getattr__(self, step: str) -> Any:
        return getattr(self._reducer, step)

    def take_classes(self, classes: Classes) -> str:
        """After `load_catalogue`; returns a line on what there is.

        Raises:
            InputError: a target row without a class, or no target row whose class has candidates.
        """
        pool = self._reducer.pool
        assert pool is not None
        self._names, self._codes = classes.names, classes.of
        numbers = {name: number for number, name in enumerate(classes.names)}
        counts = np.bincount(classes.of[pool.scorable & (classes.of >= 0)], minlength=len(numbers))
        wanted: Counter[str] = Counter()
        self._wanted = np.empty(len(self._reducer.columns.columns), dtype=np.int64)
        for index, column in enumerate(self._reducer.columns.columns):
            (row,) = column.rows
            label = classes.targets[column.target][row]
            if label is None:
                catalogue = self._reducer.targets[column.target]
                place = f"{catalogue.files[catalogue.file[row]].url} row {catalogue.row[row]}"
                raise InputError(f"{KEY}: {place}: no value in the column {self._column!r}")
            wanted[label] += 1
            self._wanted[index] = numbers.get(label, -1)
        missing = {x: n for x, n in wanted.items() if x not in numbers or not counts[numbers[x]]}
        if len(missing) == len(wanted):
            raise _strangers(wanted, self._names)
        text = f"classes: {int((counts > 0).sum()):,} of the candidates, {len(wanted):,} of targets"
        if missing:
            listed = ", ".join(f"{name} ({n:,} rows)" for name, n in sorted(missing.items()))
            text += f"; no candidate has, and left out are: {listed}"
        return text

    def fit_products(self, exact: ExactUnits, unit: bool) -> str:
        """Inner products with the target rows' gradients, or (`unit`) cosines; returns the key."""
        reducer = self._reducer
        targets = mean_gradients(
            reducer.cache, exact.targets, reducer.targets, reducer.columns, unit=unit
        )
        return write_predictor(self._scoring, linear_predictor(targets, units=unit))

    def judge(self, scores: Mapping[str, Sequence[Unit]]) -> Judged:
        """AUC and recall by the score shards of every method, on the rows that all of them have.

        Raises:
            InputError: no target row can be judged.
        """
        pool, codes = self._reducer.pool, self._codes
        assert pool is not None
        tables = {name: self._table(units) for name, units in scores.items()}
        scored = np.logical_and.reduce([scored_rows(table) for table in tables.values()])
        ranked = pool.scorable & (codes >= 0) & scored
        own = codes[ranked]
        counts = np.bincount(own, minlength=len(self._names))
        of = np.where(self._wanted < 0, 0, counts[self._wanted])
        judged = np.flatnonzero((of > 0) & (of < len(own)))
        left = {UNKNOWN: int((of == 0).sum()), ALONE: int(((of > 0) & (of == len(own))).sum())}
        if not len(judged):
            raise InputError(f"{KEY}: no target row can be judged ({_counted(left)})")
        figures = {name: self._figures(t, ranked, own, judged) for name, t in tables.items()}
        reasons = pool.reasons()
        left_out = {
            DUPLICATES: reasons.pop("duplicate", 0),
            NO_SCORE: sum(reasons.values()) + int((pool.scorable & ~scored).sum()),
            NO_CLASS: int((pool.scorable & scored & (codes < 0)).sum()),
        }
        return Judged(
            {name: [mean_error(each) for each in f] for name, f in figures.items()},
            self._by_class(figures, judged, counts),
            len(own),
            len(judged),
            {what: n for what, n in left_out.items() if n},
            {what: n for what, n in left.items() if n},
        )

    def _table(self, units: Sequence[Unit]) -> ScoreTable:
        pool = self._reducer.pool
        assert pool is not None
        columns = len(self._reducer.columns.columns)
        return ShardTable(Cache(self._scoring), units, pool, pool.scorable, columns)

    def _figures(
        self,
        table: ScoreTable,
        ranked: Bool[np.ndarray, " n"],
        own: Int[np.ndarray, " r"],
        judged: Int[np.ndarray, " t"],
    ) -> Float[np.ndarray, "4 t"]:
        """AUC and recall of every target row that is judged, by the scores and by their size."""
        found = np.empty((4, len(judged)))
        for place, scores in enumerate(_columns(table, ranked, judged)):
            same = own == self._wanted[judged[place]]
            found[0, place] = area_under_curve(scores, same)
            found[1, place] = recall_of_class(scores, same)
            # A row of the class with another answer may pull the other way as strongly.
            found[2, place] = area_under_curve(np.abs(scores), same)
            found[3, place] = recall_of_class(np.abs(scores), same)
        return found

    def _by_class(
        self, figures: Mapping[str, np.ndarray], judged: np.ndarray, counts: np.ndarray
    ) -> dict[str, dict[str, Any]]:
        found = {}
        for code in np.unique(self._wanted[judged]).tolist():
            rows = self._wanted[judged] == code
            found[self._names[code]] = {
                "candidates": int(counts[code]),
                "target_rows": int(rows.sum()),
                "auc": {name: float(f[0, rows].mean()) for name, f in figures.items()},
                "recall": {name: float(f[1, rows].mean()) for name, f in figures.items()},
            }
        return dict(sorted(found.items()))


def _columns(
    table: ScoreTable, ranked: Bool[np.ndarray, " n"], wanted: Int[np.ndarray, " t"]
) -> Iterator[Float[np.ndarray, " r"]]:
    """These columns of the table, one after the other, for the rows that are ranked."""
    slot = np.cumsum(ranked) - 1
    rows = int(ranked.sum())
    step = max(1, _HELD // max(1, rows))
    for start in range(0, len(wanted), step):
        some = wanted[start : start + step]
        held = np.empty((len(some), rows))
        for block in table.blocks():
            kept = ranked[block.positions]
            held[:, slot[block.positions[kept]]] = block.P[kept][:, some].T
        yield from held


def read_classes(
    column: str, files: Sequence[SourceFile], targets: Mapping[str, Sequence[SourceFile]]
) -> Classes:
    """Every row's class.

    Raises:
        InputError: a file without the column, or no class that candidates and targets share.
    """
    numbers: dict[str, int] = {}
    parts = []
    for file in files:
        values = _values(file, column)
        codes = [-1 if x is None else numbers.setdefault(x, len(numbers)) for x in values]
        parts.append(np.asarray(codes, dtype=np.int32))
    of_targets = {
        name: [value for file in each for value in _values(file, column)]
        for name, each in targets.items()
    }
    wanted = {value for values in of_targets.values() for value in values if value is not None}
    if wanted.isdisjoint(numbers):
        raise _strangers(wanted, numbers)
    return Classes(list(numbers), np.concatenate(parts), of_targets)


def _strangers(wanted: Iterable[str], found: Iterable[str]) -> InputError:
    return InputError(
        f"{KEY}: no candidate has a class of the target rows ({_some(wanted)}); those of the "
        f"candidates: {_some(found)}"
    )


def _values(file: SourceFile, column: str) -> list[str | None]:
    """The column as texts."""
    values = read_column(file, column)
    if values is None:
        names = column_names(file)
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{KEY}: {file.url}: no column {column!r}; {hint}its columns: {', '.join(names)}"
        )
    return [None if value is None else str(value) for value in values]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names) or ["none"]
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _counted(left: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in left.items() if n)
