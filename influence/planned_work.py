"""What a run has to do, stage by stage: from the catalogue and the cache's listing, no model runs.

The units are those of `influence.pipeline`, planned by the same code, so that a run computes the
shards that are listed here as missing, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from influence import cost, shard_bytes
from influence.certified import MAX_INDUCING
from influence.exact_work import Chosen, ExactWork, plan_exact
from influence.input_bytes import file_bytes
from influence.job import Job
from influence.methods import METHODS
from influence.missing_work import PREDICTOR_BYTES, MissingWork
from influence.model_shape import ModelShape
from influence.optimizer_use import TARGET_GRADIENTS
from influence.own_training_work import training_work
from influence.quantities import Decided, Quantities, StageWork, driver_seconds
from influence.result_bytes import WALKS, of_results
from influence.rounds_work import round_scores, rows_of_others
from influence.second_order_work import NOTE, further_columns, second_order_work
from influence.units import Unit


@dataclass
class Work:
    """Stages in order. `chosen` are the first landmarks, where the method draws any."""

    stages: dict[str, StageWork] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chosen: Chosen | None = None
    exact: ExactWork | None = None


def plan_work(
    job: Job,
    reduce: Any,
    counts: Mapping[str, Any],
    shape: ModelShape | None,
    replicas: int,
    decided: Decided | None = None,
) -> Work:
    """Every stage after the catalogue, which has to be there.

    Raises:
        InputError: too few candidates for landmarks, and what else the run itself would raise.
    """
    planner = Planner(MissingWork(job, reduce, shape, replicas), counts, decided)
    planner.own_training()
    METHODS[job.config.method].plan(planner)
    return planner.work


@dataclass
class Planner:
    """What a method's plan is made with: each call adds a stage to `work`, in order.

    Attributes:
        missing: counts the shards that the cache lacks.
        counts: of the catalogue.
        decided: what an earlier run of the same settings went through, where it is known.
        beside: bytes of the targets' gradients, where they are a stage of their own.
        score_bytes: of the shards of one map to scores, if there is any.
    """

    missing: MissingWork
    counts: Mapping[str, Any]
    decided: Decided | None
    work: Work = field(default_factory=Work)
    beside: int = 0
    score_bytes: int = 0

    def own_training(self) -> None:
        """The training that comes first, where the job makes one."""
        if self.job.own_training is None:
            return
        stage = training_work(self.job, self.missing.reduce)
        self.add(stage)
        if stage.least.bundles:
            self.work.notes.append(
                f"{stage.name}: it is fine-tuned first; what is made with it is all new"
            )

    def second_order(self, gradients: StageWork, chosen: Chosen | None) -> None:
        """What comes between the gradients and the scores."""
        weights = self.job.config.weights
        if weights.order == 1:
            return
        for stage in second_order_work(self.missing, self.counts, gradients, chosen):
            self.add(stage)
        if weights.curvature == "hvp":
            self.work.notes.append(NOTE)

    def gradients(self, chosen: Chosen | None) -> StageWork:
        """The candidates' stage; adds that of the targets' full gradients, if there is any."""
        work = self.work.exact = plan_exact(self.job, self.missing.reduce, chosen)
        if work.borrowed:
            self.work.notes.append(
                f"{work.stage}: {work.borrowed:,} rows are read from {len(work.lenders):,} shards "
                "that were made for another choice of rows"
            )
        if self.job.config.gradients.projection == "exact":
            vectors = [unit for members in work.vectors.values() for unit in members]
            self.add(self.missing.stage("target_vectors", vectors))
        units = work.units.all
        if work.units.targets and TARGET_GRADIENTS in self.job.fingerprints:
            of_targets = [unit for members in work.units.targets.values() for unit in members]
            apart = self.missing.stage(TARGET_GRADIENTS, of_targets)
            self.add(apart)
            self.beside, units = apart.whole, work.units.candidates
        stage = self.missing.stage(work.stage, units)
        lent = sum(self.missing.stored.sizes(list(work.lenders)).values())
        return replace(stage, least=replace(stage.least, read=stage.least.read + lent))

    def note_others(self, stage: StageWork) -> None:
        """Of earlier rounds, whose rows this run's rounds may ask for: about how many there are."""
        assert self.work.exact is not None
        rows = rows_of_others(self.missing, stage.name, self.work.exact)
        if rows:
            self.work.notes.append(
                f"{stage.name}: the cache holds about {rows:,} further rows, which rounds need not "
                "compute again"
            )

    def as_decided(self, stage: StageWork, decided: Decided) -> StageWork:
        """`stage` with the rounds of an earlier run, whose shards are all there."""
        there = self.missing.stored.sizes(list(decided.keys))
        self.work.notes.append(
            f"{stage.name}: the rounds are those of {decided.source}, whose rows are in the cache"
        )
        shards = max(stage.shards, len(there))
        held = max(stage.held, sum(there.values()))
        return replace(stage, shards=shards, cached=shards - stage.least.shards, held=held)

    def fit(
        self,
        embedding: StageWork,
        gradients: StageWork,
        landmarks: int,
        maps: int,
        most: tuple[int, int] | None,
    ) -> None:
        """The regression: gradients, and the embeddings' shards that hold one of their rows."""
        certified = self.job.config.landmarks.choose == "certified"
        rows = self.job.config.replicas.rows_per_shard
        assert self.work.chosen is not None
        holding = {(file.url, row // rows) for file, members in self.work.chosen for row in members}
        part = min(1.0, len(holding) / max(1, embedding.shards))
        looking = round_scores(self.job.config, self.counts, self.columns) if certified else 0.0

        def of(exact: int, written: int, times: int) -> Quantities:
            known = min(exact, MAX_INDUCING) if certified else exact
            operations = cost.regression(known, self.missing.width, self.columns)
            effort = driver_seconds(times, operations, looking)
            read = gradients.held + self.beside + written + round(part * embedding.whole)
            return Quantities(effort=effort, read=read)

        first = of(landmarks, gradients.least.written or 0, maps)
        last = None
        if most is not None and gradients.most is not None:
            last = of(most[0], gradients.most.written or 0, most[1])
        self.add(StageWork("regression", first, last, replicas=False))

    def scores(
        self,
        vectors: StageWork,
        units: Sequence[Unit],
        width: int,
        centres: int,
        maps: int = 1,
        most: tuple[int, int] | None = None,
        *,
        variance: bool = False,
    ) -> None:
        """The map from the units' vectors, of `width` numbers: once, or once in every round."""
        rows = [unit.count for unit in units]
        self.score_bytes = self.score_bytes_of(units)

        def of(exact: int, times: int) -> Quantities:
            known = min(exact, MAX_INDUCING) if variance else exact
            effort = cost.scores(sum(rows), width, known, self.columns, variance=variance)
            numbers = known * (width + self.columns + (known if variance else 0))
            predictor = 8 * numbers + PREDICTOR_BYTES
            return Quantities(
                shards=times * len(units),
                bundles=times * len(units),
                rows=times * sum(rows),
                effort=times * effort,
                read=times * (vectors.whole + self.missing.replicas * predictor),
                written=times * (self.score_bytes + predictor),
                objects=times * (len(units) + 1),
            )

        last = None if most is None else of(most[0], most[1])
        self.add(StageWork("scores", of(centres, maps), last, shards=maps * len(units)))

    def selection(self, landmarks: int) -> None:
        """Choosing the rows, and the files of the results."""
        written, objects = of_results(self.job, self.counts, landmarks, self.missing.mean_texts)
        read = sum(map(file_bytes, self.job.files)) + WALKS * self.score_bytes
        effort = driver_seconds(1, 0.0, self.counts["rows"] * (self.columns + 8))
        quantities = Quantities(effort=effort, read=read, written=written, objects=objects)
        self.add(StageWork("selection", quantities, replicas=False))

    @property
    def job(self) -> Job:
        """Whose work it is."""
        return self.missing.job

    def add(self, stage: StageWork) -> None:
        """Put a stage after those that are there."""
        self.work.stages[stage.name] = stage

    @cached_property
    def columns(self) -> int:
        """Score columns of all targets, and what the second order puts beside them."""
        own = sum(target["columns"] for target in self.counts["targets"].values())
        return own + further_columns(self.job.config, self.counts)

    def score_bytes_of(self, units: Sequence[Unit]) -> int:
        """What the shards of one map from these units to scores take."""
        return sum(shard_bytes.score_shard(self.columns, unit.count) for unit in units)
