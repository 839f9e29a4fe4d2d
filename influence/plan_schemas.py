"""The JSON documents of plans: `influence plan --json`, and the bill in a run's manifest.

As in `influence.schemas` and `influence.records`, everything that another program may read is
declared here.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class Amounts(BaseModel):
    """What a stage takes, or took; null where it is not counted. Shards, rows and so on are those
    that are computed: what the cache holds is not in them."""

    shards: int | None = None
    rows: int | None = None
    tokens: int | None = None
    flops: float | None = None
    read_bytes: int | None = Field(default=None, description="planned only")
    written_bytes: int | None = None
    objects: int | None = Field(default=None, description="written")
    seconds: float = Field(default=0.0, description="wall time")
    gpu_hours: float = 0.0
    node_hours: float = 0.0
    money: float | None = Field(default=None, description="null without a price")


#: What of `Amounts` is compared with what was planned.
COMPARED = ("shards", "rows", "tokens", "flops", "written_bytes", "objects", "seconds")
COMPARED += ("gpu_hours", "node_hours", "money")


class StageBill(BaseModel):
    """One stage: planned, and once the run is done what it took.

    Attributes:
        shards: of the stage, those in the cache among them.
        cached: shards that the cache held.
        planned: what is to do; with `at_most`, at least.
        at_most: where the run itself decides how much (certified rounds).
        ratio: took / planned; 1 between `planned` and `at_most`, beyond them by the nearer one.
        speed: what the seconds were estimated from.
        effort: what `planned.seconds` were made from, in units of the stage's own.
        done: the same of what it took.
    """

    shards: int = 0
    cached: int = 0
    planned: Amounts = Field(default_factory=Amounts)
    at_most: Amounts | None = None
    took: Amounts | None = None
    ratio: dict[str, float] = Field(default_factory=dict)
    speed: str = ""
    effort: float = 0.0
    done: float | None = None


class ReplicaKind(BaseModel):
    """What decides a replica's speed, beside its device."""

    num_gpus: float
    num_cpus: int
    dtype: str


class Bill(BaseModel):
    """All stages of a run, in order, and their total.

    Attributes:
        replicas: that work at once at most.
        nodes: that they are on.
        node_hour: price of one; null if the config names none.
        set_up_seconds: of a replica before it can begin; `set_up` says where that is from.
    """

    replica: ReplicaKind
    replicas: int
    nodes: int
    node_hour: float | None
    currency: str
    set_up_seconds: float = 0.0
    set_up: str = ""
    stages: dict[str, StageBill] = Field(default_factory=dict)
    total: StageBill = Field(default_factory=StageBill)


class PlanDocument(BaseModel):
    """What `influence plan --json` writes.

    Attributes:
        counts: rows, tokens, reasons, of the pool and of every target, as in `manifest.json`.
        selection: how much will be selected, in words.
        memory: bytes that a replica needs, by what for; null for methods without gradients.
        coverage: which parameters the gradients cover, as in `manifest.json`.
        notes: what is printed as notes.
    """

    format_version: int
    run: str
    cache: str
    method: str
    counts: dict[str, Any]
    selection: str
    bill: Bill
    memory: dict[str, int] | None = None
    coverage: list[dict[str, Any]] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class MeasuredStage(BaseModel):
    """How fast a stage was: `effort` in so many seconds of replicas (of the driver for its own)."""

    fingerprint: str
    values: dict[str, Any] = Field(default_factory=dict)
    devices: list[str] = Field(default_factory=list)
    effort: float
    seconds: float


class Measured(BaseModel):
    """What a run leaves in the cache for later plans: `history/*.json`.

    Attributes:
        source: the run directory, or what else was measured.
        set_up_seconds: of one replica; null where no model was loaded.
        decided: digest of what decided which rows certified rounds asked for; "" without rounds.
        exact: keys of the shards of exact gradients that they asked for.
        exact_rows: candidates with exact scores in the end.
        maps: how often they mapped embeddings to scores.
    """

    source: str
    finished: str
    replica: ReplicaKind
    set_up_seconds: float | None = None
    stages: dict[str, MeasuredStage] = Field(default_factory=dict)
    decided: str = ""
    exact: list[str] = Field(default_factory=list)
    exact_rows: int = 0
    maps: int = 0
