"""The pilot of `embedding.kind: auto` in the reducer: its rows, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from influence import landmarks
from influence.cache import Cache
from influence.candidates import SourceFile
from influence.catalogue import Catalogue
from influence.config import Config
from influence.embedding_economy import look
from influence.errors import InputError
from influence.fidelity import certify
from influence.result_bytes import selected_rows
from influence.scoring import ExactScores
from influence.selection import Rule
from influence.shard_reader import read_embeddings
from influence.target_columns import TargetColumns
from influence.units import Unit

Chosen = list[tuple[SourceFile, list[int]]]


class Judged(NamedTuple):
    """Of one embedding: see `influence.embedding_record.EmbeddingOption`.

    rows: used of the pilot (landmarks, others). selected: part of the pool that the budget takes.
    """

    share: float
    spearman: float | None
    recall: float | None
    width: int
    rows: tuple[int, int]
    selected: float


def draw_rows(pool: Catalogue, seed: int, count: int, purpose: bytes) -> Chosen:
    """Random candidates that can be scored: the rows of each file. Independent by purpose."""
    eligible = pool.eligible
    keys = landmarks.row_keys(seed, pool.digests, purpose=purpose)[eligible]
    return pool.by_file(eligible[landmarks.choose_uniform(keys, count)])


def draw_pilot(config: Config, pool: Catalogue) -> Chosen:
    """The random rows of `layers: auto`, or of `embedding.kind: auto`."""
    economy = config.method == "in2core"
    count = config.layer_economy.pilot if economy else config.embedding.pilot
    return draw_rows(pool, config.seed, count, b"pilot")


def selected_share(config: Config, pool: Catalogue) -> float:
    """Part of the candidates that can be scored that the budget selects."""
    scored = len(pool.eligible)
    tokens = int(pool.n_tokens[pool.eligible].sum())
    counts = {"scored": scored, "rows": scored, "tokens": tokens}
    return max(1, selected_rows(config.selection.budget, counts)) / scored


def judge_embeddings(
    config: Config,
    cache: Cache,
    pool: Catalogue,
    columns: TargetColumns,
    rule: Rule,
    exact: tuple[Int[np.ndarray, " l"], ExactScores],
    pilots: Sequence[Sequence[Unit]],
) -> list[Judged]:
    """Every embedding on the same landmarks and random rows, those that it cannot embed left out.

    Raises:
        InputError: too few landmarks can be embedded.
    """
    section, share = config.landmarks, selected_share(config, pool)
    lengths = section.kernel == "linear"
    known, Y = exact[0], exact[1].P[:, : len(columns.columns)]
    found = []
    for units in pilots:
        rows = np.unique(
            np.concatenate([pool.positions(unit.file, unit.row_numbers) for unit in units])
        )
        others = np.setdiff1d(rows[pool.scorable[rows]], known)
        X = read_embeddings(cache, units, pool, np.concatenate([known, others]), lengths=lengths)
        usable = np.asarray(np.isfinite(X).all(axis=1))
        first, rest = usable[: len(known)], usable[len(known) :]
        if first.sum() < 4:
            raise InputError(
                f"embedding.kind: auto: {first.sum()} landmarks have an embedding; expected 4"
            )
        looked = look(
            X[: len(known)][first],
            Y[first],
            X[len(known) :][rest],
            rule.decides(),
            share=share,
            recall=section.recall,
            shared=rule.combine != "round_robin",
            kernel=section.kernel,
            damping=section.damping,
        )
        mix = columns.named()
        claims = certify(
            Y[first] @ mix, looked.loo @ mix, n=len(pool.eligible), share=share, seed=config.seed
        )
        found.append(
            Judged(
                looked.share,
                _mean([claim.spearman.value for claim in claims]),
                _mean([claim.recall.expected for claim in claims]),
                X.shape[1],
                (int(first.sum()), int(rest.sum())),
                share,
            )
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
