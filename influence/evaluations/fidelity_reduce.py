"""The evaluation `fidelity` in the reducer: true scores, and one embedding's settings at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from influence.budget import Budget, parse_budget
from influence.catalogue import Catalogue
from influence.config import Config
from influence.embedding_reduce import draw_rows, selected_share
from influence.errors import InputError
from influence.evaluations.own_run import OwnReduce
from influence.fidelity_grid import Played, Setting, Trial, play, play_settings, try_setting
from influence.landmarks import choose_uniform, row_keys
from influence.selection import Rule
from influence.selection_rule import selection_rule
from influence.shard_reader import read_embeddings, read_exact_scores
from influence.target_columns import TargetColumns
from influence.text_columns import Labels
from influence.units import ExactUnits, Unit

#: The head that is looked at beside the budget's.
HEAD = 0.05
OVERALL = "mean of the targets"


class FidelityReduce(OwnReduce):
    """Memory for the scores of the pilot's rows and one embedding of them."""

    def draw(self, count: int) -> Any:
        """So many random rows: the rows of each file."""
        own = self.reducer
        assert own.pool is not None
        return draw_rows(own.pool, own.config.seed, count, b"fidelity")

    def take_truth(self, exact: ExactUnits) -> dict[str, Any]:
        """Read the exact scores; returns what the document says of them.

        Raises:
            InputError: fewer than 16 rows have one.
        """
        own = self.reducer
        assert own.pool is not None
        where = (own.cache, exact, own.pool, own.targets, own.columns)
        self._rows, scores = read_exact_scores(*where, own.config.gradients.normalize)
        if len(self._rows) < 16:
            raise InputError(
                f"evaluation.fidelity: {len(self._rows)} rows have exact scores; expected 16"
            )
        self._Y, self._mix = scores.P, mixed(own.columns.named(), own.columns.target_of)
        self._share = selected_share(own.config, own.pool)
        return {
            "pilot": len(self._rows),
            "pool": len(own.pool.eligible),
            "share": self._share,
            "top": self._tops(len(self._rows)),
            "columns": self._Y.shape[1],
            "names": [*own.columns.names, OVERALL],
        }

    def measure(
        self, units: Sequence[Unit], settings: Sequence[Setting], repeats: int
    ) -> list[list[Trial]]:
        """For each setting of one embedding a trial for every draw of landmarks."""
        own = self.reducer
        assert own.pool is not None
        found, embedded = [], {}
        for setting in settings:
            lengths = setting.kernel == "linear"
            if lengths not in embedded:
                embedded[lengths] = self._embedded(units, lengths)
            usable, X = embedded[lengths]
            Y = np.concatenate([self._Y[usable], self._Y[usable] @ self._mix], axis=1)
            trials = []
            for draw in range(repeats):
                keys = self._keys(usable, f"grid {draw}")
                trials.append(
                    try_setting(
                        X,
                        Y,
                        choose_uniform(keys, setting.landmarks),
                        kernel=setting.kernel,
                        damping=setting.damping,
                        tops=self._tops(len(X)),
                        stated=self._mix.shape[1],
                        share=self._share,
                        seed=own.config.seed,
                        pool=len(own.pool.eligible) - (len(self._rows) - len(usable)),
                    )
                )
            found.append(trials)
        return found

    def play(self, units: Sequence[Unit], recall: float, repeats: int) -> list[Played]:
        """Certified rounds with one embedding, once for every draw of the first landmarks."""
        own = self.reducer
        assert own.pool is not None
        section, seed = own.config.landmarks, own.config.seed
        usable, X = self._embedded(units, section.kernel == "linear")
        rule = pilot_rule(own.config, own.pool, own.columns, self._rows[usable])
        settings = play_settings(len(X), recall, section.kernel, section.damping, seed)
        return [
            play(
                X,
                self._Y[usable],
                rule,
                own.columns.named(),
                keys=(self._keys(usable, f"grid {draw}"), self._keys(usable, f"audit {draw}")),
                settings=settings,
            )
            for draw in range(repeats)
        ]

    def _embedded(
        self, units: Sequence[Unit], lengths: bool
    ) -> tuple[Int[np.ndarray, " u"], Float[np.ndarray, "u e"]]:
        """(which of the pilot's rows have an embedding, those)."""
        own = self.reducer
        assert own.pool is not None
        X = read_embeddings(own.cache, units, own.pool, self._rows, lengths=lengths)
        usable = np.flatnonzero(np.isfinite(X).all(axis=1))
        return usable, X[usable].astype(np.float64)

    def _keys(self, usable: Int[np.ndarray, " u"], purpose: str) -> Any:
        own = self.reducer
        assert own.pool is not None
        digests = [own.pool.digests[position] for position in self._rows[usable]]
        return row_keys(own.config.seed, digests, purpose=purpose.encode())

    def _tops(self, rows: int) -> list[int]:
        """Rows of the budget's head, and of the best 5 %."""
        return [max(1, round(share * rows)) for share in (self._share, HEAD)]


def mixed(
    named: Float[np.ndarray, "m names"], target_of: Int[np.ndarray, " m"]
) -> Float[np.ndarray, "m overall"]:
    """What turns columns into the names' scores, and last into the mean over the targets."""
    sizes = np.bincount(target_of)
    overall = 1.0 / (sizes[target_of] * len(sizes))
    return np.concatenate([named, overall[:, None]], axis=1)


def pilot_rule(
    config: Config, pool: Catalogue, columns: TargetColumns, rows: Int[np.ndarray, " r"]
) -> Rule:
    """The run's rule for some rows of the pool; a budget in numbers is cut in proportion."""
    whole = selection_rule(config, pool, columns)
    part, budget = len(rows) / max(1, len(pool.eligible)), parse_budget(config.selection.budget)
    if budget.rows is not None:
        budget = Budget(rows=max(1, round(budget.rows * part)))
    elif budget.tokens is not None:
        budget = Budget(tokens=max(1, round(budget.tokens * part)))
    return replace(
        whole,
        ranks=np.argsort(np.argsort(whole.ranks[rows])),
        budget=budget,
        sources=Labels.of(pool.sources.codes[rows], pool.sources.values),
        n_tokens=pool.n_tokens[rows],
    )
