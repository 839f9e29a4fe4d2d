"""Which candidates are (nearly) target rows: their matches by position, counts, and columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from influence.cache import Cache
from influence.candidates import Example, SourceFile, read_rows, short_names
from influence.catalogue import Catalogue, row_id
from influence.config import Config
from influence.contamination_record import Contamination, Found, MatchedRow
from influence.near_duplicates import KINDS
from influence.records import to_json
from influence.schemas import REASON_CONTAMINATED, SELECTION_CONTAMINATION_FIELDS
from influence.shard_reader import read_shards
from influence.units import Unit

#: Rows whose text a report shows, and how much of it.
EXAMPLES, CHARACTERS = 10, 600
#: The columns of some rows' positions and scores, as `influence.outputs.write_scores` takes them.
ColumnsOf = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]


@dataclass(frozen=True)
class TargetRows:
    """The target rows that were matched: names and labels (NAME:ID), and where they are."""

    name: list[str]
    label: list[str]
    example: list[Example | None]


@dataclass(frozen=True)
class Matches:
    """The candidates with a match, by position in the pool; the arrays are parallel.

    Attributes:
        action: what becomes of them.
        kind: index of `near_duplicates.KINDS`.
        overlap: 1, the share of n-grams, or the estimated Jaccard similarity.
        target: index of the target row in `targets`.
        counts: whether the row could be scored, were it not for its match.
    """

    action: str
    positions: Int[np.ndarray, " c"]
    kind: Int[np.ndarray, " c"]
    overlap: Float[np.ndarray, " c"]
    target: Int[np.ndarray, " c"]
    counts: Bool[np.ndarray, " c"]
    targets: TargetRows

    @property
    def shown(self) -> bool:
        """Whether the results have the columns."""
        return self.action != "keep"

    def columns(self, positions: Int[np.ndarray, " b"]) -> dict[str, Any]:
        """`contamination` (the target row's label) and `overlap` of these rows; null without."""
        place = np.searchsorted(self.positions, positions)
        place = np.minimum(place, max(0, len(self.positions) - 1))
        none = np.ones(len(positions), dtype=bool)
        if not len(self.positions):
            nothing = pa.nulls(len(positions), pa.string())
            return {"contamination": nothing, "overlap": np.full(len(positions), np.nan)}
        none = self.positions[place] != positions
        labels = pa.array(self.targets.label, pa.string())
        return {
            "contamination": labels.take(pa.array(self.target[place], mask=none)),
            "overlap": np.where(none, np.nan, self.overlap[place]),
        }

    def beside(self, columns_of: ColumnsOf) -> ColumnsOf:
        """The columns of `scores/` with these beside them."""
        if not self.shown:
            return columns_of
        return lambda positions, P: {**columns_of(positions, P), **self.columns(positions)}

    def selection_columns(
        self, order: Int[np.ndarray, " k"]
    ) -> list[tuple[pa.Field, pa.Array | np.ndarray]]:
        """The columns of the selected rows, in their order."""
        if not self.shown:
            return []
        values = self.columns(order)
        values["overlap"] = pa.array(values["overlap"], mask=np.isnan(values["overlap"]))
        return list(zip(SELECTION_CONTAMINATION_FIELDS, values.values(), strict=True))

    def record(self, order: Int[np.ndarray, " k"] | None = None) -> Contamination:
        """How many rows there are, by kind and by target; once selected, how many of those."""
        selected = None if order is None else np.isin(self.positions, order)

        def found(which: Bool[np.ndarray, " c"]) -> Found:
            which = which & self.counts
            chosen = None if selected is None else int((which & selected).sum())
            return Found(rows=int(which.sum()), selected=chosen)

        names = np.asarray(self.targets.name, dtype=object)[self.target]
        return Contamination(
            action=self.action,
            all=found(np.ones(len(self.positions), dtype=bool)),
            kinds={kind: found(self.kind == code) for code, kind in enumerate(KINDS)},
            targets={name: found(names == name) for name in dict.fromkeys(self.targets.name)},
        )

    def counted(self, order: Int[np.ndarray, " k"] | None = None) -> dict[str, Any]:
        """The record as the manifest's counts have it."""
        return {"contamination": self.record(order).model_dump(exclude={"examples"})}

    def document(self, pool: Catalogue, order: Int[np.ndarray, " k"]) -> bytes:
        """RUN/contamination.json."""
        record = self.record(order)
        record.examples = self.examples(pool, order)
        return to_json(record)

    def examples(self, pool: Catalogue, order: Int[np.ndarray, " k"]) -> list[MatchedRow]:
        """The worst ones with their texts: selected rows first, then by kind and overlap."""
        rank = np.full(len(self.positions), len(order))
        _rows, at, place = np.intersect1d(self.positions, order, return_indices=True)
        rank[at] = place
        counted = np.flatnonzero(self.counts)
        keys = (self.positions, rank, -self.overlap, self.kind, rank == len(order))
        first = counted[np.lexsort([key[counted] for key in keys])][:EXAMPLES]
        return [self._example(pool, int(index), int(rank[index]), len(order)) for index in first]

    def _example(self, pool: Catalogue, index: int, rank: int, selected: int) -> MatchedRow:
        position, target = int(self.positions[index]), int(self.target[index])
        file, row = pool.files[pool.file[position]], int(pool.row[position])
        (example,) = read_rows(file, [row])
        return MatchedRow(
            id=pool.ids[position] or "",
            source=pool.sources[position],
            rank=rank + 1 if rank < selected else None,
            kind=KINDS[self.kind[index]],
            overlap=float(self.overlap[index]),
            target=self.targets.label[target],
            text=_text(example),
            target_text=_text(self.targets.example[target]),
        )


def find_matches(
    config: Config, cache: Cache, units: Sequence[Unit], pool: Catalogue
) -> Matches | None:
    """The matches of a pool; where they are to be dropped, they get their reason. None: not asked.

    A duplicate of an earlier row keeps that reason; the earlier row has the same match.
    """
    if config.contamination is None or not units:
        return None
    found = read_matches(cache, units, pool, config.contamination.action)
    if found.action == "drop":
        pool.exclude(found.positions, REASON_CONTAMINATED)
    return found


def read_matches(cache: Cache, units: Sequence[Unit], pool: Catalogue, action: str) -> Matches:
    """Put the contamination shards of a pool together; only rows with a match are held."""
    parts: list[dict[str, np.ndarray]] = []
    for unit, shard in read_shards(cache, units):
        table = shard.table.filter(pc.is_valid(shard.table.column("kind")))  # pyright: ignore
        if table.num_rows:
            columns = {name: table.column(name).to_numpy() for name in table.column_names}
            columns["row"] = pool.positions(unit.file, columns["row"])
            parts.append(columns)

    def joined(name: str, kind: Any) -> np.ndarray:
        return np.concatenate([np.empty(0, kind), *(part[name].astype(kind) for part in parts)])

    positions, rows = joined("row", np.int64), joined("target_row", np.int64).tolist()
    places: dict[tuple[str, int], int] = {}
    hashes = joined("target_file", object).tolist()
    target = [places.setdefault(each, len(places)) for each in zip(hashes, rows, strict=True)]
    kinds = joined("kind", object).tolist()
    return Matches(
        action=action,
        positions=positions,
        kind=np.array([KINDS.index(kind) for kind in kinds], dtype=np.int64),
        overlap=joined("overlap", np.float64),
        target=np.array(target, dtype=np.int64),
        counts=pool.scorable[positions],
        targets=_target_rows(units[0].against, list(places)),
    )


def _target_rows(
    against: Sequence[tuple[str, SourceFile]], places: Sequence[tuple[str, int]]
) -> TargetRows:
    """The names and texts of target rows, given by their files' contents."""
    found = TargetRows([""] * len(places), [""] * len(places), [None] * len(places))
    short = {
        name: short_names([file.url for other, file in against if other == name])
        for name, _file in against
    }
    left = dict(enumerate(places))
    # Targets come before further files: the first name whose rows have it is told.
    for name, file in against:
        here = [
            index
            for index, (content, row) in left.items()
            if content == file.content_hash and row < file.rows
        ]
        examples = read_rows(file, [left.pop(index)[1] for index in here])
        for index, example in zip(here, examples, strict=True):
            label = row_id(example.id, short[name][file.url], example.row)
            found.name[index], found.label[index] = name, f"{name}:{label}"
            found.example[index] = example
    return found


def _text(example: Example | None) -> str:
    """The turns of a row, one below the other, cut to a length."""
    assert example is not None  # every place is of a file that was looked for
    text = "\n".join(f"{message.role}: {message.content}" for message in example.messages)
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " […]"
