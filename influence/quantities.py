"""What one stage of a run has to do: counts, before prices and speeds are put to them."""

from __future__ import annotations

from dataclasses import dataclass

from influence.fingerprints import Fingerprint

#: Stages whose shards lie beside a run's results, and go when it is done.
OF_RUN = ("curvature", "scores", "token_scores")
#: Steps of the driver, which no replica takes part in.
DRIVER = ("layers", "second_order", "regression", "coverage", "selection")
# Of the driver: operations and scores that it gets through in a second, and what a step takes
# whatever there is to do. From the runs in docs/results.md, on two cores.
_OPERATIONS, _SCORES, _STEP = 5e10, 5e6, 0.05


def driver_seconds(steps: int, operations: float = 0.0, scores: float = 0.0) -> float:
    """What so many steps of the driver take, of so many operations and scores each."""
    return steps * (_STEP + operations / _OPERATIONS + scores / _SCORES)


@dataclass(frozen=True)
class Quantities:
    """What is to do. None: not counted.

    Attributes:
        shards: to compute. bundles: the same, those of one pass counted once.
        rows, tokens: as the run's record will count them.
        flops: of the models.
        effort: what the time goes by: operations; of the catalogue bytes of its rows in the files;
            of the driver's own steps seconds, at the speeds of `driver_seconds`.
        read, written: bytes.
        objects: written.
    """

    shards: int = 0
    bundles: int = 0
    rows: int | None = 0
    tokens: int | None = None
    flops: float | None = None
    effort: float = 0.0
    read: int = 0
    written: int | None = 0
    objects: int = 0


@dataclass(frozen=True)
class StageWork:
    """One stage.

    Attributes:
        shards: all of its shards, cached ones among them.
        held: bytes of the cached ones.
        least: what is to do, in any case.
        most: where the run itself decides how much: what is to do at most.
        missing: keys of the shards to compute that are known beforehand.
        replicas: whether replicas compute it, or the driver alone.
        workers: so many of a training compute it, and no replica is there yet.
    """

    name: str
    least: Quantities
    most: Quantities | None = None
    fingerprint: Fingerprint | None = None
    shards: int = 0
    cached: int = 0
    held: int = 0
    missing: tuple[str, ...] = ()
    replicas: bool = True
    workers: int | None = None

    @property
    def whole(self) -> int:
        """Bytes of all shards, once they are there."""
        return self.held + (self.least.written or 0)


@dataclass(frozen=True)
class Decided:
    """What an earlier run of the same config and data went through: its rounds, and their shards.

    Attributes:
        source: that run.
        keys: of the shards of exact gradients, in the cache still.
        rows: candidates with exact scores in the end.
        maps: from embeddings to scores.
    """

    source: str
    keys: tuple[str, ...]
    rows: int
    maps: int
