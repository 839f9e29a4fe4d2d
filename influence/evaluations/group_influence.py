"""Evaluation `group_influence`: what would leaving the whole selection out do to the targets?

The group are the rows that a run selected. First order, second order and the sum of the members one
by one, by DataInf's inverses (`influence.group_influence`): three passes more over shards that are
in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool
from pydantic import BaseModel

from influence import storage
from influence.config import Config
from influence.curvature_units import STAGE, Query
from influence.errors import InputError
from influence.evaluations.kind import Evaluation, ResultTable
from influence.evaluations.own_run import OwnReduce, all_gradients, evaluated_run, own_config
from influence.group_influence import datainf_group_influence
from influence.in2core import map_sums, solve_influence
from influence.job import Job, timed
from influence.report_format import percent, significant
from influence.units import ExactUnits, Unit

NAME = "group_influence"


@dataclass(frozen=True)
class Group:
    """Which rows of the pool were selected, in the order of files and rows, and their ids."""

    run: str
    chosen: Bool[np.ndarray, " n"]
    ids: list[str]


class Effect(BaseModel):
    """Expected change of a target's loss without the group, in DataInf's unit: above 0 where the
    group helps. See `influence.group_influence.GroupInfluence`."""

    members: float
    first: float
    second: float


class About(BaseModel):
    """rows, of: the group's, and all that count in the curvature. without_gradient: rows of the
    group that have none, or duplicate another row."""

    run: str
    rows: int
    of: int
    without_gradient: int
    model: str
    adapter: str | None


class GroupEffects(BaseModel):
    """The document of evaluation.json: an effect for every target and group of targets."""

    targets: dict[str, Effect]
    about: About


class GroupReduce(OwnReduce):
    """The group in the reducer: memory for some vectors and the targets' columns."""

    def take_group(self, group: Group) -> str:
        """After `load_catalogue`; returns a line on the group.

        Raises:
            InputError: the selection is of another pool, or of all of it.
        """
        pool = self.reducer.pool
        assert pool is not None
        where = np.flatnonzero(group.chosen)
        if len(group.chosen) != len(pool) or [pool.ids[int(i)] for i in where] != group.ids:
            raise InputError(
                f"evaluation.{NAME}: {group.run} selected from another pool ({len(group.chosen):,} "
                f"rows, here {len(pool):,}); run `influence select` on this one"
            )
        self._group = group.chosen & pool.scorable
        if not self._group.any() or not (pool.scorable & ~group.chosen).any():
            what = "none" if not self._group.any() else "all"
            raise InputError(
                f"evaluation.{NAME}: {group.run} selected {what} of the rows that can be scored; "
                "expected some"
            )
        return f"group: {len(where):,} of {len(pool):,} rows, selected by {group.run}"

    def group_sums(self, exact: ExactUnits) -> list[Unit]:
        """After `fit_influence`: the units that sum up the group's gradients."""
        pool, influence = self.reducer.pool, self.reducer.influence
        assert pool is not None
        self._shards = [
            unit
            for unit in exact.sketches
            if self._group[pool.positions(unit.file, unit.row_numbers)].any()
        ]
        query = influence.query
        nothing = np.zeros((1, query.targets.shape[1]), np.float32)
        plain = Query(nothing, query.damping, query.unit, plain=True)
        return influence.sums_of(self._shards, self._group, plain)

    def group_curvature(self, sums: list[Unit]) -> list[Unit]:
        """Of those sums, the units of pass 1 over the group alone, for its mean gradient."""
        influence = self.reducer.influence
        total, self._rows = influence.added(sums)
        if not self._rows:
            raise InputError(f"evaluation.{NAME}: not one row of the group has a usable gradient")
        self._mean = total[0] / self._rows
        query = influence.query
        mean = self._mean[None].float().numpy()
        self._query = Query(mean, query.damping, query.unit)
        return influence.sums_of(self._shards, self._group, self._query)

    def group_effects(self, sums: list[Unit]) -> dict[str, Any]:
        """The effects by name, the group's rows, and all."""
        influence = self.reducer.influence
        own, _rows = influence.solved(self._query, sums)
        found = datainf_group_influence(
            torch.from_numpy(influence.query.targets).double(),
            torch.from_numpy(influence.products),
            self._mean,
            torch.from_numpy(own[0]),
            self._rows,
            influence.rows,
        )
        columns = self.reducer.columns
        named = {name: (each.numpy() @ columns.named()) for name, each in found._asdict().items()}
        effects = {
            name: Effect(**{kind: float(values[j]) for kind, values in named.items()})
            for j, name in enumerate(columns.names)
        }
        return {"targets": effects, "rows": self._rows, "of": influence.rows}


def settings(config: Config) -> Config:
    """In2Core's own settings, and the targets as they are.

    Raises:
        InputError: gradients that In2Core has no use for.
    """
    return own_config(config, NAME)


def inputs(config: Config) -> Group:
    """The rows that the run selected.

    Raises:
        InputError: there is no selection.
    """
    section = config.evaluation.group_influence
    assert section is not None
    run = section.run or evaluated_run(config, NAME)
    chosen, ids = [], []
    for part in _parts(run):
        picked = part.column("weight").to_numpy() > 0
        chosen.append(picked)
        ids += part.column("id").filter(pa.array(picked)).to_pylist()
    if not chosen:
        raise InputError(
            f"evaluation.{NAME}: {run} has no selection yet, which is the group; run `influence "
            f"select` first, or name a run in evaluation.{NAME}.run"
        )
    return Group(run, np.concatenate(chosen), ids)


def _parts(run: str) -> Iterator[pa.Table]:
    for info in storage.list_objects(storage.join(run, "scores")):
        with pq.ParquetFile(storage.open_input(info.url)) as part:
            yield part.read(columns=["id", "weight"])


def run(job: Job, reduce: Any, group: Group) -> dict[str, Any]:
    """DataInf's passes for the targets, then those for the group.

    Raises:
        InputError: a group of another pool, of all of it, or without gradients.
    """
    units = all_gradients(job, reduce, lambda: reduce.take_group(group))
    solve_influence(job, reduce, units)
    sums = reduce.group_sums(units)
    map_sums(job, sums)
    own = reduce.group_curvature(sums)
    map_sums(job, own)
    with timed(job, STAGE, quiet=True):
        found = reduce.group_effects(own)
    about = About(
        run=group.run,
        rows=found["rows"],
        of=found["of"],
        without_gradient=len(group.ids) - found["rows"],
        model=job.config.model.name,
        adapter=job.config.model.adapter,
    )
    return GroupEffects(targets=found["targets"], about=about).model_dump(mode="json")


def table(document: dict[str, Any]) -> ResultTable:
    """A line for each target and group."""
    found = GroupEffects.model_validate(document)
    about = found.about
    rows = [
        (name, *(significant(x) for x in (each.members, each.first, each.second)))
        for name, each in found.targets.items()
    ]
    caption = (
        f"Expected change of the targets' losses if the {about.rows:,} rows selected by "
        f"{about.run} ({percent(about.rows / about.of)} of {about.of:,}) were left out: above 0, "
        "the rows help. Members: the sum of their own influences. First order: the others count "
        "more in their place. Second order: and they have another curvature. In DataInf's unit, "
        "which is no loss: what counts are signs and proportions."
    )
    if about.without_gradient:
        caption += f" {about.without_gradient:,} rows of the group have no gradient of their own."
    headings = ("Without the group", "Members", "First order", "Second order")
    return ResultTable("Group influence", caption, headings, rows)


EVALUATION = Evaluation(settings, inputs, GroupReduce, run, table)
