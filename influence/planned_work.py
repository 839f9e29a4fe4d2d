"""What a run has to do, stage by stage: from the catalogue and the cache's listing, no model runs.

The units are those of `influence.pipeline`, planned by the same code, so that a run computes the
shards that are listed here as missing, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from influence import cost, shard_bytes
from influence.certified import MAX_INDUCING, rounds_at_most
from influence.embedding_plan import plan_embedding
from influence.exact_work import Chosen, ExactWork, plan_exact
from influence.in2core import vector_width
from influence.in2core_work import curvature_work, together
from influence.input_bytes import file_bytes
from influence.job import Job
from influence.memory_budget import parse_memory
from influence.missing_work import PREDICTOR_BYTES, MissingWork
from influence.model_shape import ModelShape
from influence.optimizer_use import TARGET_GRADIENTS
from influence.own_training_work import training_work
from influence.pool_units import embedding_units, rds_target_units
from influence.quantities import Decided, Quantities, StageWork, driver_seconds
from influence.result_bytes import WALKS, of_results
from influence.rounds_work import most_work, round_scores, rows_of_others
from influence.second_order_work import NOTE, further_columns, second_order_work
from influence.sentence_encoder import TEXTS_PER_SECOND
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
    planner = _Planner(MissingWork(job, reduce, shape, replicas), counts, decided)
    planner.own_training()
    {
        "influence_distillation": planner.influence_distillation,
        "exact": planner.exact,
        "in2core": planner.in2core,
        "rds": planner.rds,
        "random": planner.random,
    }[job.config.method]()
    return planner.work


@dataclass
class _Planner:
    missing: MissingWork
    counts: Mapping[str, Any]
    decided: Decided | None
    work: Work = field(default_factory=Work)
    kept: float = 1.0  # of the numbers of a row's gradient
    beside: int = 0  # bytes of the targets' gradients, where they are a stage of their own

    def own_training(self) -> None:
        if self.job.own_training is None:
            return
        stage = training_work(self.job, self.missing.reduce)
        self.add(stage)
        if stage.least.bundles:
            self.work.notes.append(
                f"{stage.name}: it is fine-tuned first; what is made with it is all new"
            )

    def influence_distillation(self) -> None:
        job, config = self.job, self.job.config
        chosen = self.work.chosen = self.missing.reduce.choose_landmarks()
        if config.embedding.kind == "auto":
            pilot, notes = plan_embedding(self.missing, chosen)
            self.work.notes += notes
            if pilot is not None:
                self.add(pilot)
            job = self.job
        landmarks = sum(len(rows) for _file, rows in chosen)
        gradients = self.gradients(chosen)
        embedding = self.missing.stage("embedding", embedding_units(job))
        certified = config.landmarks.choose == "certified"
        maps, most, centres = 1, None, landmarks
        if certified and self.decided is not None:
            maps, gradients = self.decided.maps, self.as_decided(gradients, self.decided)
            centres = (landmarks + self.decided.rows) // 2  # of all rounds, in the mean
            landmarks = self.decided.rows
        elif certified:
            limit = max(landmarks, min(config.landmarks.count, self.counts["scored"]))
            rounds = rounds_at_most(landmarks, limit)
            of_targets = [target["columns"] for target in self.counts["targets"].values()]
            extra = limit - landmarks
            all_rounds = most_work(self.missing, gradients, chosen, of_targets, extra, rounds)
            self.note_others(gradients)
            gradients, most = replace(gradients, most=all_rounds), (limit, rounds + 1)
        self.add(gradients)
        self.add(embedding)
        self.second_order(gradients, chosen)
        self.fit(embedding, gradients, landmarks, maps, most)
        self.scores(embedding, self.missing.width, centres, maps, most, variance=certified)
        self.selection(landmarks)

    def exact(self) -> None:
        gradients = self.gradients(None)
        self.add(gradients)
        self.second_order(gradients, None)
        numbers = float(self.counts["rows"] * (self.columns + 8))
        read = gradients.whole + self.beside
        scoring = Quantities(read=read, effort=driver_seconds(1, 0.0, numbers))
        self.add(StageWork("scores", scoring, replicas=False))
        self.selection(0)

    def second_order(self, gradients: StageWork, chosen: Chosen | None) -> None:
        """What comes between the gradients and the scores."""
        weights = self.job.config.weights
        if weights.order == 1:
            return
        for stage in second_order_work(self.missing, self.counts, gradients, chosen):
            self.add(stage)
        if weights.curvature == "hvp":
            self.work.notes.append(NOTE)

    def rds(self) -> None:
        units = embedding_units(self.job)
        of_targets = [u for members in rds_target_units(self.job).values() for u in members]
        self.add(self.missing.stage("embedding", [*of_targets, *units]))
        embedding = self.missing.stage("embedding", units)
        self.scores(embedding, self.missing.width, self.columns)
        self.selection(0)

    def random(self) -> None:
        self.selection(0)

    def in2core(self) -> None:
        config = self.job.config
        gradients = self.chosen_layers() if config.layers == "auto" else self.gradients(None)
        self.add(gradients)
        shape, units = self.missing.shape, self.scored_units
        width = round(vector_width(config, shape) * self.kept)
        curvature = curvature_work(units, gradients.whole, self.columns, width, len(shape.sizes))
        self.add(curvature)
        if config.gradients.reduction != "token_max":
            self.scores(gradients, width, self.columns)
        else:
            self.add(self.missing.token_scores(units, self.columns, width, self.score_bytes))
            effort = driver_seconds(1, 0.0, float(self.counts["rows"] * (self.columns + 1)))
            looking = Quantities(read=self.score_bytes, effort=effort)
            self.add(StageWork("scores", looking, replicas=False))
        if config.transfer.model is not None:
            self.work.notes.append(
                f"transfer: a pilot of {config.transfer.pilot:,} rows goes through "
                f"{config.transfer.model.name}, too; its bill is that of the run RUN/transfer"
            )
        if config.coverage.encoder is not None:
            targets = sum(target["rows"] for target in self.counts["targets"].values())
            texts = targets + min(config.coverage.candidates, self.counts["scored"])
            effort = driver_seconds(1) + texts / TEXTS_PER_SECOND
            self.add(StageWork("coverage", Quantities(effort=effort), replicas=False))
        self.selection(0)

    def chosen_layers(self) -> StageWork:
        """Gradients of a pilot, all layers, and then of every row those that the pilot chooses."""
        chosen = self.work.chosen = self.missing.reduce.choose_pilot()
        pilot = self.gradients(chosen)
        rows = sum(len(members) for _file, members in chosen)
        shape, config = self.missing.shape, self.job.config
        effort = driver_seconds(1, cost.curvature(rows, shape.attributed, self.columns))
        choosing = Quantities(read=3 * pilot.whole, effort=effort)
        self.add(StageWork("layers", choosing, replicas=False))
        self.work.exact = plan_exact(self.job, self.missing.reduce, None)
        share, memory = parse_memory(config.layer_economy.memory)
        whole = 4 * vector_width(config, shape) * self.counts["rows"]
        self.kept = min(1.0, share if share is not None else (memory or 0.0) / whole)
        if self.decided is not None:
            return self.as_decided(pilot, self.decided)
        # Under which name they will be kept is not known, nor whether they are there already.
        unknown = [replace(unit, fingerprint="unknown") for unit in self.work.exact.units.all]
        rest = self.missing.stage("gradients", unknown)
        self.work.notes.append(
            f"layers: auto: counted with all that layer_economy.memory lets be kept "
            f"({self.kept:.0%} of the layers' bytes), and the operations of all layers, which is "
            "the most"
        )
        return together(pilot, rest, self.kept)

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
        width: int,
        centres: int,
        maps: int = 1,
        most: tuple[int, int] | None = None,
        *,
        variance: bool = False,
    ) -> None:
        """The map from vectors of `width` numbers to scores: once, or once in every round."""
        units = self.scored_units
        rows = [unit.count for unit in units]

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
        mapped = self.job.config.method in ("influence_distillation", "rds", "in2core")
        read = sum(map(file_bytes, self.job.files)) + (WALKS * self.score_bytes if mapped else 0)
        effort = driver_seconds(1, 0.0, self.counts["rows"] * (self.columns + 8))
        quantities = Quantities(effort=effort, read=read, written=written, objects=objects)
        self.add(StageWork("selection", quantities, replicas=False))

    @property
    def job(self) -> Job:
        return self.missing.job

    def add(self, stage: StageWork) -> None:
        self.work.stages[stage.name] = stage

    @cached_property
    def columns(self) -> int:
        """Score columns of all targets, and what the second order puts beside them."""
        own = sum(target["columns"] for target in self.counts["targets"].values())
        return own + further_columns(self.job.config, self.counts)

    @cached_property
    def scored_units(self) -> list[Unit]:
        """The units whose vectors are mapped to scores."""
        if self.job.config.method != "in2core":
            return embedding_units(self.job)
        assert self.work.exact is not None  # gradients come first
        return self.work.exact.units.sketches

    @cached_property
    def score_bytes(self) -> int:
        """What the shards of one map to scores take."""
        rows = [unit.count for unit in self.scored_units]
        return sum(shard_bytes.score_shard(self.columns, each) for each in rows)
