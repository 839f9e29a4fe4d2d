"""The reducer: reads committed shards, solves the regression once, scores, selects, writes.

It holds the run's arrays and nothing of Ray; on a cluster it lives in an actor, in one process it
is called directly. Every method returns a small summary, never the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from influence import landmarks, scoring
from influence.cache import Cache
from influence.candidates import SourceFile, none_usable
from influence.catalogue import Catalogue
from influence.certificate import certificate_of
from influence.certified_result import recall_certificate
from influence.checkpoint_reduce import CheckpointReduce
from influence.config import Config
from influence.contamination_reduce import find_matches
from influence.coverage_reduce import Likeness, coverage_of, likeness_of
from influence.embedding_reduce import Judged, draw_pilot, judge_embeddings
from influence.in2core_reduce import InfluenceReduce
from influence.landmark_reduce import LandmarkReduce, RoundsReduce, RoundStep, draw_landmarks
from influence.load import Load
from influence.methods import METHODS
from influence.pool_counts import pool_counts
from influence.predictor import cosine_predictor, write_predictor
from influence.records import LayerChoice
from influence.results import write_results
from influence.robust_reduce import RobustReduce
from influence.row_scores import PoolRows, score_rows, without_gradients
from influence.score_shards import ShardTable, run_table, scoring_url
from influence.score_table import ArrayTable
from influence.scores import Scores
from influence.second_order_plan import Along, DirectionPlan, MadeVectors, check_covariance
from influence.selection import Rule
from influence.selection_rule import check_quotas, method_weights, selection_rule
from influence.shard_reader import (
    NO_EMBEDDING,
    NO_GRADIENT,
    check_target_rows,
    read_catalogue,
    read_embeddings,
    read_exact_scores,
)
from influence.table_selection import select_table
from influence.target_columns import mean_vectors, rows_behind, target_columns
from influence.unit_loads import UnitLoad, load_of, training_load, unit_loads
from influence.units import ExactUnits, Unit, Units


class Reducer:
    """One run's reduce, step by step: catalogue, landmarks, scores, selection, files."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = Cache(config.cache_url)
        self.pool: Catalogue | None = None
        self._rounds: RoundsReduce | None = None
        self._likeness: Likeness | None = None
        self._robust: RobustReduce | None = None

    def load_catalogue(
        self, pool: Units, targets: Mapping[str, Units], contamination: Units = ()
    ) -> dict[str, Any]:
        """Read the catalogue and contamination shards; returns the counts for the manifest."""
        self.pool = read_catalogue(self.cache, pool, drop_duplicates=True)
        self.matches = find_matches(self.config, self.cache, contamination, self.pool)
        self.load_targets(targets)
        if not len(self.pool.eligible):
            raise none_usable("data.candidates", self.pool.files, self.pool.reasons())
        check_quotas(self.config, self.pool)
        return self.counts()

    def load_targets(self, targets: Mapping[str, Sequence[Unit]]) -> None:
        """Read the targets' catalogue shards and name their columns: enough for `target_rows`."""
        self.targets = {
            name: read_catalogue(self.cache, units, drop_duplicates=False)
            for name, units in targets.items()
        }
        described = self.config.targets
        self.columns = target_columns(
            self.targets,
            {name: described[name].per for name in self.targets},
            {name: described[name].group_by is not None for name in self.targets},
        )
        check_covariance(self.config.weights, self.columns)

    def counts(self) -> dict[str, Any]:
        """Rows, reasons, duplicates, truncation: of the pool and of every target."""
        config = self.config.selection
        return pool_counts(self._pool, self.targets, self.columns, config, self.matches)

    def tokens_of(self, units: Sequence[Unit]) -> list[int]:
        """Tokens that the model sees of each unit's rows: what there is to do."""
        return [each.tokens for each in self.loads_of(units)]

    def loads_of(self, units: Sequence[Unit]) -> list[UnitLoad]:
        """What computing each unit takes."""
        return unit_loads((*self.targets.values(), self._pool), units)

    def pool_load(self) -> Load:
        """The load of all candidates that can be scored."""
        return load_of(self._pool, self._pool.eligible)

    def training_load(self, fraction: float, seed: int, max_length: int) -> Load:
        """The load of one epoch over a random part of the pool; duplicates are trained on, too."""
        return training_load(self._pool, fraction, seed, max_length)

    def choose_landmarks(self) -> list[tuple[SourceFile, list[int]]]:
        """Draw the landmarks; returns the rows of each file."""
        return draw_landmarks(self.config, self._pool)

    def target_rows(self) -> dict[str, list[tuple[SourceFile, list[int]]]]:
        """The rows behind every column of every target: (file, rows)."""
        return rows_behind(self.columns, self.targets)

    def fit_landmarks(self, embedding: Sequence[Unit], exact: ExactUnits) -> str:
        """Fit on the landmarks' exact scores; returns the key of what predicts every other row."""
        self._landmarks = LandmarkReduce(self.config, self.cache, self._pool, self.columns)
        return self._landmarks.fit(embedding, *self._exact_scores(exact))

    def take_predicted(self, units: Sequence[Unit]) -> None:
        """The score shards of `fit_landmarks`, with the landmarks' exact scores over them."""
        self._take(self._landmarks.scores(self._shard_table(units)))

    def fit_round(self, embedding: Sequence[Unit], exact: ExactUnits) -> str:
        """Take in the exact scores of the last rows asked for, and fit again.

        Returns the key of what the process believes of every row.
        """
        first = self._rounds is None
        if self._rounds is None:
            self._rounds = RoundsReduce(
                self.config, self.cache, self._pool, self.columns, self._rule
            )
        return self._rounds.fit(embedding, *self._exact_scores(exact, needed=first))

    def next_round(self, units: Sequence[Unit]) -> RoundStep:
        """Ask for the next rows, after the score shards of `fit_round`."""
        assert self._rounds is not None
        step, scores = self._rounds.next_step(self._shard_table(units))
        if scores is not None:
            self.scores = scores
        return step

    def _shard_table(self, units: Sequence[Unit], reason: str = NO_EMBEDDING) -> ShardTable:
        """The score shards; rows without a score get this reason."""
        columns = self.column_count() if self._robust is None else self._robust.width
        return run_table(self.config.run, units, self._pool, columns, reason)

    def begin_second_order(self, exact: ExactUnits) -> DirectionPlan | None:
        """After the gradients' shards are there, before they are scored: the directions, if any."""
        self._robust = RobustReduce(self.config, self.cache, self._pool, self.targets, self.columns)
        return self._robust.begin(exact)

    def take_second_order(self, made: MadeVectors | None, along: Along | None) -> None:
        """The shards of what `begin_second_order` asked for."""
        assert self._robust is not None
        self._robust.take(made, along)

    def score_exact(self, exact: ExactUnits) -> None:
        """Exact scores for every candidate."""
        positions, scores = self._exact_scores(exact)
        scored = self._pool.scorable[positions]
        positions, P = positions[scored], scores.P[scored]
        halves = None if scores.halves is None else scores.halves[:, scored]
        self._all_exact(positions, P, halves)

    def fit_means(self, targets: Mapping[str, Sequence[Unit]]) -> str:
        """RDS+: cosine with the targets' mean embeddings; returns the key of what predicts it."""
        rows = {}
        for name, units in targets.items():
            catalogue = self.targets[name]
            everything = np.arange(len(catalogue))
            rows[name] = read_embeddings(self.cache, units, catalogue, everything)
            check_target_rows(name, catalogue, rows[name])
        predictor = cosine_predictor(mean_vectors(self.columns, rows))
        return write_predictor(scoring_url(self.config.run), predictor)

    def take_cosines(self, units: Sequence[Unit]) -> None:
        """The score shards of `fit_means`."""
        self.scores = without_gradients(self._shard_table(units), self._pool)

    def fit_checkpoint(self, exact: ExactUnits) -> str:
        """LESS: the targets at the next checkpoint; returns the key of what scores by them."""
        return self._checkpoints.fit(exact)

    def take_checkpoints(self, units: Sequence[Sequence[Unit]], weights: Sequence[float]) -> None:
        """The weighted sum of the score shards of every `fit_checkpoint`."""
        self.scores = self._checkpoints.scores(units, weights)

    def column_count(self) -> int:
        """Columns of the scores."""
        return len(self.columns.columns)

    def choose_pilot(self) -> list[tuple[SourceFile, list[int]]]:
        """Draw the rows on which layers or an embedding are chosen: the rows of each file."""
        return draw_pilot(self.config, self._pool)

    def judge_embeddings(self, exact: ExactUnits, pilots: Sequence[Sequence[Unit]]) -> list[Judged]:
        """What the landmarks' exact scores say of every embedding of a pilot."""
        known, where = self._exact_scores(exact), (self.cache, self._pool, self.columns)
        return judge_embeddings(self.config, *where, self._rule, known, pilots)

    def choose_layers(self, pilot: ExactUnits) -> LayerChoice:
        """The layers to keep, by the gradients of the pilot's rows."""
        return self._begun_influence().choose_layers(pilot, self.config.layer_economy.memory)

    def begin_influence(self, exact: ExactUnits) -> list[Unit]:
        """DataInf's pass 0 and the targets' gradients; returns the units of its pass 1."""
        self.influence = self._begun_influence()
        return self.influence.begin(exact)

    def _begun_influence(self) -> InfluenceReduce:
        return InfluenceReduce(
            self.cache,
            scoring_url(self.config.run),
            self._pool,
            self.targets,
            self.columns,
            unit=self.config.gradients.normalize,
        )

    def fit_influence(self, sums: Sequence[Unit]) -> str:
        """After the sums of pass 1; returns the key of what turns gradients into scores."""
        return self.influence.predictor(sums)

    def take_influences(self, units: Sequence[Unit], gradients: Sequence[Unit]) -> None:
        """The score shards of `fit_influence`, and what the gradients' projections leave open."""
        table = self._shard_table(units, NO_GRADIENT)
        halves = self.influence.halves(gradients)
        positions = self._pool.eligible
        none = np.empty((0, len(self.columns.columns)))
        self.scores = Scores(table, self._pool.scorable, positions, none, None, halves)

    def compare_texts(self) -> None:
        """Sentence embeddings of candidates and targets, for the coverage."""
        settings = self.config.coverage
        assert settings.encoder is not None
        self._likeness = likeness_of(
            settings.encoder,
            self._pool,
            self.targets,
            self.columns,
            nearest=settings.nearest,
            candidates=settings.candidates,
            seed=self.config.seed,
        )

    def score_rows(self, method: str, units: Sequence[Unit] = ()) -> None:
        """Scores by the function of a method, from the catalogue and its shards (these units)."""
        rows = PoolRows(self.config, self._pool, self.targets, self.columns, self.cache, units)
        self.scores = score_rows(METHODS[method], rows)

    def select(self, owner: str | None = None) -> dict[str, Any]:
        """Choose the rows and their weights; certify; write every file but the report.

        Raises:
            RunTakenError: the run is no longer that of the lease of this `owner`.
        """
        pool, config, table = self._pool, self.config.selection, self.scores.table
        certified = None if self._rounds is None else self._rounds.certified
        selected, objective = None if certified is None else certified.selected, None
        if self._robust is not None:
            selected, objective = self._robust.select(self._rule, self._whole)
        elif selected is None:
            selected = select_table(self._rule, table)
        selection = method_weights(self.config.method, selected.selection)
        fidelity = certificate_of(
            self.scores,
            selection,
            self.columns,
            method=self.config.method,
            combine=config.combine,
            seed=self.config.seed,
            landmark_choice=landmarks.CHOICES[self.config.landmarks.choose],
            recall=None if certified is None else recall_certificate(certified),
        )
        fidelity.objective = objective
        coverage = None
        if METHODS[self.config.method].signed:
            coverage = coverage_of(table, pool, self.columns, self._likeness)
        written = write_results(
            self.config,
            pool,
            self.scores,
            selected._replace(selection=selection),
            fidelity,
            self.columns,
            owner,
            coverage,
            self.matches,
        )
        return {**written, "counts": {**self.counts(), **written["counts"]}}

    @cached_property
    def _rule(self) -> Rule:
        """The selection rule; made once, as it sorts the ids of the whole pool."""
        return selection_rule(self.config, self._pool, self.columns)

    @cached_property
    def _checkpoints(self) -> CheckpointReduce:
        return CheckpointReduce(self.config.run, self.cache, self._pool, self.targets, self.columns)

    @property
    def _pool(self) -> Catalogue:
        if self.pool is None:
            raise RuntimeError("load_catalogue comes first")
        return self.pool

    def _exact_scores(
        self, exact: ExactUnits, *, needed: bool = True
    ) -> tuple[np.ndarray, scoring.ExactScores]:
        return read_exact_scores(
            self.cache,
            exact,
            self._pool,
            self.targets,
            self.columns,
            self.config.gradients.normalize,
            needed=needed,
            further=None if self._robust is None else self._robust.further,
        )

    def _take(self, scores: Scores) -> None:
        """Keep the scores; with what else the second order has made of rows beside them."""
        if self._robust is None:
            self.scores = scores
            return
        self._whole, first = scores.table, len(self.columns.columns)
        self.scores = replace(
            scores,
            table=self._robust.scores(scores.table),
            exact_scores=scores.exact_scores[:, :first],
            halves=None if scores.halves is None else scores.halves[..., :first],
        )

    def _all_exact(
        self, positions: np.ndarray, values: np.ndarray, halves: np.ndarray | None = None
    ) -> None:
        P = np.full((len(self._pool), values.shape[1]), np.nan)
        P[positions] = values
        exact = ~np.isnan(P[:, 0])
        self._take(Scores(ArrayTable(P), exact, positions, values, None, halves))
