"""Units of work that read committed shards and need no model: scores, and sums of DataInf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from influence import curvature_units
from influence.cache import Cache
from influence.config import Config
from influence.curvature_units import curvature_table, read_query
from influence.predictor import Mapper, Predictor, read_predictor
from influence.score_shards import score_table_of, scoring_url
from influence.units import Unit

T = TypeVar("T")

SCORING_STAGES = ("scores", curvature_units.STAGE)


class ScoringUnits:
    """Computes such units on one replica; what they share is read once.

    Args:
        device: the replica's device, as a function: asking for it also sets its threads.
    """

    def __init__(self, config: Config, device: Callable[[], str]) -> None:
        self._cache = Cache(config.cache_url)
        self._scoring = Cache(scoring_url(config.run))
        self._device = device
        self._held: tuple[str, Any] | None = None

    def run(self, unit: Unit) -> tuple[str, int]:
        """Compute and commit one unit; returns the outcome, and the rows of its table."""
        if self._scoring.verified(unit.key):
            return "exists", 0
        url, device = self._scoring.url, self._device()
        facts: dict[str, Any] = {}
        if unit.stage == curvature_units.STAGE:
            query = self._once(unit.needs[0], lambda key: read_query(url, key))
            table, facts = curvature_table(self._cache, url, unit, query, device)
        else:
            predictor, mapper = self._once(unit.needs[0], self._mapper)
            table = score_table_of(self._cache.read(unit.needs[1]), predictor, mapper)
        meta = {
            "stage": unit.stage,
            "fingerprint": unit.fingerprint,
            "first": unit.first,
            "last": unit.last,
            "device": device,
            "torch": torch.__version__,
            **facts,
        }
        return self._scoring.commit(unit, table, meta), table.num_rows

    def _mapper(self, key: str) -> tuple[Predictor, Mapper]:
        predictor = read_predictor(self._scoring.url, key)
        return predictor, Mapper(predictor, self._device())

    def _once(self, key: str, read: Callable[[str], T]) -> T:
        """The object of this key; the last one is kept."""
        if self._held is None or self._held[0] != key:
            self._held = None  # dropped before the next one is read: they may be large
            self._held = (key, read(key))
        return self._held[1]
