"""Landmarks in the reducer: which rows they are, and the regression on them, once or in rounds.

The rows' exact scores are handed in; what comes out predicts, or believes, every row's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from influence import landmarks
from influence.cache import Cache
from influence.candidates import SourceFile
from influence.catalogue import Catalogue
from influence.certified import Certified, Settings, audit_rows, initial_landmarks, step_text
from influence.certified_result import certified_scores
from influence.config import Config
from influence.errors import InputError
from influence.predictor import posterior_predictor, regression_predictor, write_predictor
from influence.score_shards import ShardTable, scoring_url
from influence.score_table import OverlaidTable
from influence.scores import Scores
from influence.scoring import ExactScores
from influence.selection import Rule
from influence.shard_reader import read_embeddings
from influence.target_columns import TargetColumns
from influence.text_columns import Labels
from influence.units import Unit


class RoundStep(NamedTuple):
    """What the next round computes: the rows of each file (none: it is done), and a line for it.

    exact: candidates that have exact scores.
    """

    rows: list[tuple[SourceFile, list[int]]]
    text: str
    exact: int


def draw_landmarks(config: Config, pool: Catalogue) -> list[tuple[SourceFile, list[int]]]:
    """The landmarks, or those that rounds begin with: the rows of each file.

    Raises:
        InputError: fewer than 4 rows can be scored.
    """
    eligible = pool.eligible
    if len(eligible) < 4:
        raise InputError(
            f"method influence_distillation needs at least 4 candidates that can be scored; "
            f"found {len(eligible)}: use method: exact"
        )
    sources = Labels.of(pool.sources.codes[eligible], pool.sources.values)
    keys = landmarks.row_keys(config.seed, pool.digests)[eligible]
    choose, count = config.landmarks.choose, config.landmarks.count
    if choose == "certified":
        count = initial_landmarks(len(eligible), count, config.landmarks.initial)
    chosen = landmarks.CHOOSERS[choose](keys, sources, count)
    return pool.by_file(eligible[chosen])


class LandmarkReduce:
    """The one regression on a run's landmarks; memory for their rows, not for the pool's.

    The kernel `linear` sees the embeddings with their lengths, the others unit rows. A prediction
    depends on the regression and on the row alone.
    """

    def __init__(
        self, config: Config, cache: Cache, pool: Catalogue, columns: TargetColumns
    ) -> None:
        self._config, self._cache, self._pool, self._columns = config, cache, pool, columns

    def fit(
        self, embedding: Sequence[Unit], positions: Int[np.ndarray, " l"], scores: ExactScores
    ) -> str:
        """Fit on the landmarks' exact scores; returns the key of what predicts every other row.

        Raises:
            InputError: not one of the landmarks could be embedded.
        """
        config, lengths = self._config.landmarks, _lengths(self._config)
        X = read_embeddings(self._cache, embedding, self._pool, positions, lengths=lengths)
        usable = np.isfinite(X).all(axis=1)
        positions, Y, first = positions[usable], scores.P[usable], len(self._columns.columns)
        halves = None if scores.halves is None else scores.halves[:, usable, :first]
        solve = partial(landmarks.fit, X[usable], kernel=config.kernel, damping=config.damping)
        model, loo_halves = solve(Y), None
        if halves is not None:
            # For the certificate: what the regression would say had it seen one half alone.
            both = solve(np.concatenate([*halves], axis=1)).loo_predictions
            loo_halves = np.stack(np.split(both, 2, axis=1))
        self._fitted = (positions, Y, model.loo_predictions[:, :first], halves, loo_halves)
        predictor = regression_predictor(model, lengths=lengths)
        return write_predictor(scoring_url(self._config.run), predictor)

    def scores(self, predicted: ShardTable) -> Scores:
        """What `fit` predicts of every row, with the landmarks' exact scores over it."""
        positions, Y, loo, halves, loo_halves = self._fitted
        table = OverlaidTable(predicted, positions, Y, np.empty(0, np.int64))
        exact = np.zeros(len(self._pool), dtype=bool)
        exact[positions] = True
        return Scores(table, exact, positions, Y, loo, halves, loo_halves)


class RoundsReduce:
    """The rounds of a certified run (`influence.certified`); memory for the exact rows.

    Made before the first exact scores are read: the audit is a part of the rows that can be scored
    by then, whatever becomes of the landmarks' gradients.

    Attributes:
        certified: the rounds' state.
    """

    def __init__(
        self, config: Config, cache: Cache, pool: Catalogue, columns: TargetColumns, rule: Rule
    ) -> None:
        self._config, self._cache, self._pool = config, cache, pool
        section = config.landmarks
        settings = Settings(
            recall=section.recall,
            count=section.count,
            audit=audit_rows(len(pool.eligible), section.audit),
            kernel=section.kernel,
            damping=section.damping,
            seed=config.seed,
        )
        keys = landmarks.row_keys(config.seed, pool.digests, purpose=b"audit")
        self.certified = Certified(rule, columns.named(), keys, settings)

    def fit(
        self, embedding: Sequence[Unit], positions: Int[np.ndarray, " b"], scores: ExactScores
    ) -> str:
        """Take in the exact scores of the last rows asked for, and fit again.

        Returns the key of what the process believes of every row.

        Raises:
            InputError: not one of the rows could be embedded.
        """
        lengths = _lengths(self._config)
        if len(positions):
            X = read_embeddings(self._cache, embedding, self._pool, positions, lengths=lengths)
            usable = np.isfinite(X).all(axis=1)
            halves = None if scores.halves is None else scores.halves[:, usable]
            self.certified.add(positions[usable], X[usable], scores.P[usable], halves)
        predictor = posterior_predictor(self.certified.fit(), lengths=lengths)
        return write_predictor(scoring_url(self._config.run), predictor)

    def next_step(self, believed: ShardTable) -> tuple[RoundStep, Scores | None]:
        """Which rows to ask for next; with the scores once that is none."""
        step = self.certified.next_step(believed, np.empty(0, np.int64))
        scores = certified_scores(self.certified) if step.kind == "done" else None
        rows = self._pool.by_file(step.rows.tolist())
        exact = self.certified.rounds[-1].exact
        return RoundStep(rows, step_text(self.certified, step), exact), scores


def _lengths(config: Config) -> bool:
    """Whether the regression sees the embeddings with their lengths."""
    return config.landmarks.kernel == "linear"
