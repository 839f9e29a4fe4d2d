"""File contracts: the JSON documents of a run and of what it trained, and what they consist of.

The Arrow schemas are in `influence.schemas`, what a plan says in `influence.plan_schemas`, what a
cache is said to hold in `influence.cache_record`.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from influence.embedding_record import EmbeddingChoice
from influence.load import Load
from influence.objective import Objective
from influence.plan_schemas import Bill
from influence.schemas import FORMAT_VERSION


class Interval(BaseModel):
    """A value with its interval; null where it is undefined (a constant target)."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class Recall(BaseModel):
    """Recall of the exact top share: what the certificate expects of it."""

    expected: float | None = None
    low: float | None = None
    high: float | None = None
    audit_low: float | None = None
    exact_gradients: int = 0


class TargetFidelity(BaseModel):
    """The certificate of one target or group."""

    recall: Recall = Field(default_factory=Recall)
    spearman: Interval = Field(default_factory=Interval)
    r2: float | None = None
    score_halfwidth: float | None = Field(default=None, description="of 90 % intervals")
    landmark_halfwidth: float = Field(default=0.0, description="for exact rows")
    sketch_sd: float | None = Field(default=None, description="sd of sketch noise")
    reliability: float | None = Field(default=None, description="of sketched scores")


class Round(BaseModel):
    """One round of a certified run: exact rows so far, and the recall with its 90 % interval."""

    exact: int
    expected: float
    low: float
    high: float


class ReliabilityBin(BaseModel):
    """Rows whose membership was predicted alike: mean prediction, part that were members."""

    rows: int
    predicted: float
    observed: float


class Fidelity(BaseModel):
    """`fidelity.json`. `exact` says that every score is exact: nothing was approximated."""

    method: str
    exact: bool
    landmarks: int = 0
    landmark_choice: str | None = Field(default=None, description="how landmarks were drawn")
    recall: Recall = Field(default_factory=Recall)
    targets: dict[str, TargetFidelity] = Field(default_factory=dict)
    estimated: int = Field(default=0, description="selected rows whose score is no exact one")
    rounds: list[Round] = Field(default_factory=list)
    reliability: list[ReliabilityBin] = Field(default_factory=list)
    objective: Objective | None = Field(default=None, description="weights.order: 2")


class FailedShard(BaseModel):
    """A shard that failed for good: which rows of which file, or which training, and why."""

    key: str
    file: str
    first: int
    last: int
    attempts: int
    error: str
    label: str = Field(default="", description="of a unit that is not these rows of this file")

    @property
    def place(self) -> str:
        """As messages call it."""
        return self.label or f"{self.file} rows {self.first}-{self.last}"

    @property
    def tries(self) -> str:
        """1 attempt, 4 attempts."""
        return "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"


class StageRecord(BaseModel):
    """One stage in the manifest."""

    fingerprint: str
    values: dict[str, Any] = Field(default_factory=dict, description="what the fingerprint covers")
    planned: list[str] = Field(default_factory=list, description="cache keys of its shards")
    shards: int = 0
    reused: int = 0
    computed: int = 0
    damaged: int = Field(default=0, description="objects that were no whole shard: made anew")
    borrowed_rows: int = Field(default=0, description="in shards made for other choices of rows")
    rows: int = 0
    tokens: int = 0
    seconds: float = Field(default=0.0, description="wall time (share of a common phase)")
    model_seconds: float = Field(default=0.0, description="model at work, all replicas")
    set_up_seconds: float = Field(default=0.0, description="loading models, building engines")
    replica_seconds: float = Field(default=0.0, description="replicas up with work of this stage")
    up_seconds: float = Field(default=0.0, description="replicas up, with work or without any")
    load: Load = Field(default=Load(), description="what the models computed")
    devices: list[str] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list, description="precision fallbacks and the like")
    failed: list[FailedShard] = Field(default_factory=list)

    @property
    def model_share(self) -> float | None:
        """Part (0 to 1) of the time in which replicas were up and had work of this stage that
        their models were at work; None where no model was.

        Everything else counts against it: setting up, reading, tokenising, writing, waiting, and
        the whole of an attempt that failed. Where stages change, up to a shard's time may be with
        the one and its model's work with the other.
        """
        if not self.model_seconds or not self.replica_seconds:
            return None
        return self.model_seconds / self.replica_seconds


class CoverageRow(BaseModel):
    """How well the pool covers one column of the scores: a target row, a group, or a target."""

    target: str
    label: str
    proponents: int
    opponents: int
    mass: float = Field(description="sum of the proponents' scores")
    harm: float = Field(description="the same of the opponents, above 0")
    effective: float = Field(description="proponents: mass^2 / sum of squared scores")
    nearest: float | None = Field(default=None, description="cosine of the nearest candidate")
    nearest_mean: float | None = Field(default=None, description="mean cosine of the nearest ones")


class Coverage(BaseModel):
    """`coverage.json` of method in2core."""

    encoder: str | None = None
    candidates: int | None = Field(default=None, description="whose texts were compared")
    rows: list[CoverageRow] = Field(default_factory=list)


class TransferColumn(BaseModel):
    """Rank correlation of the two models' scores for one target or group, over `rows` rows."""

    name: str
    rows: int
    spearman: Interval = Field(default_factory=Interval)


class Transfer(BaseModel):
    """`transfer.json`: the reference's ranking against the target model's own, on a pilot."""

    model: str
    adapter: str | None = None
    parameters: str | list[str] = Field(description="of the target model's gradients")
    pilot: int
    columns: list[TransferColumn] = Field(default_factory=list)


class EpochCheckpoint(BaseModel):
    """What a training left after an epoch: its folder, and the mean rate of the epoch's steps."""

    folder: str
    step: int
    learning_rate: float


class OwnTrainingRecord(BaseModel):
    """`reference.json`, `warmup.json` in the cache: what a job trained for itself, and of what."""

    fingerprint: str
    values: dict[str, Any] = Field(default_factory=dict, description="what the fingerprint covers")
    rows: int = Field(description="trained on")
    left_out: dict[str, int] = Field(default_factory=dict, description="by reason")
    steps: int
    tokens: int
    seconds: float
    workers: int
    device: str
    epoch_losses: list[float] = Field(default_factory=list, description="mean of each epoch")
    checkpoints: list[EpochCheckpoint] = Field(
        default_factory=list, description="after each epoch, where they are kept"
    )
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(
        default_factory=dict, description="blake2b of the files that later stages read"
    )


class OwnTrainingUse(BaseModel):
    """A run's reference model or warm-up."""

    url: str
    reused: bool = Field(description="made before this run, on the same cache")
    record: OwnTrainingRecord


class LayerSubset(BaseModel):
    """Some layers that were judged: how many groups, what they take of a row, how well they rank.

    `spearman` is on the pilot's rows that the choice was made on, `held_out` on the others.
    """

    rule: str
    groups: int
    row_bytes: int
    spearman: float
    held_out: float


class LayerChoice(BaseModel):
    """What `layers: auto` chose on a pilot, and every subset that it was held against."""

    names: list[str] = Field(description="the parameters whose gradients are kept")
    rule: str
    pilot: int = Field(description="rows of it with a usable gradient")
    groups: int = Field(description="of layers, in the model")
    row_bytes: int
    full_row_bytes: int
    budget_row_bytes: float
    rows: int = Field(description="of the pool")
    spearman: float
    held_out: float
    table: list[LayerSubset] = Field(default_factory=list)


class ReplicaCount(BaseModel):
    """Replicas when the manifest was written."""

    up: int = 0
    awaited: int = Field(default=0, description="demanded, and not up")
    up_seconds: float = Field(default=0.0, description="of all replicas so far, at work or not")
    most: int = Field(default=0, description="up at once so far")


class Pace(BaseModel):
    """The shards that are being computed, when the manifest was written."""

    samples_per_second: float | None = Field(default=None, description="in the last minute")
    tokens_per_second: float | None = Field(default=None, description="in the last minute")
    seconds_left: float | None = Field(default=None, description="without `not_begun`")
    not_begun: list[str] = Field(default_factory=list, description="stages of unknown speed")


class Manifest(BaseModel):
    """`manifest.json`: what the run did, and with what."""

    format_version: int = FORMAT_VERSION
    method: str
    state: str = Field(default="running", description="running, done, failed or interrupted")
    doing: str = Field(default="", description="the step that is at work")
    started: datetime | None = None
    written: datetime | None = None
    cache: str = Field(default="", description="the cache's URL, absolute")
    replicas: ReplicaCount | None = None
    pace: Pace | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, Any] = Field(default_factory=dict)
    coverage: list[dict[str, Any]] = Field(default_factory=list)
    reference: OwnTrainingUse | None = Field(default=None, description="of `reference.finetune`")
    warmup: OwnTrainingUse | None = Field(default=None, description="of `warmup`")
    layers: LayerChoice | None = Field(default=None, description="of `layers: auto`")
    embedding: EmbeddingChoice | None = Field(default=None, description="of `embedding.kind: auto`")
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    bill: Bill | None = Field(default=None, description="what was planned, and what it took")
    objective: Objective | None = Field(default=None, description="of `weights.order: 2`")

    @property
    def model_share(self) -> float | None:
        """`StageRecord.model_share` of all stages in which a model was at work."""
        stages = self._with_model()
        whole = sum(record.replica_seconds for record in stages)
        return sum(record.model_seconds for record in stages) / whole if whole else None

    @property
    def set_up_share(self) -> float | None:
        """Part of the same time that went into loading models and building what they need."""
        stages = self._with_model()
        whole = sum(record.replica_seconds for record in stages)
        return sum(record.set_up_seconds for record in stages) / whole if whole else None

    @property
    def model_share_of_up(self) -> float | None:
        """Part of the time in which replicas were up, with work or without any, that their models
        were at work; None where that is not known."""
        model = sum(record.model_seconds for record in self.stages.values())
        if not model or self.replicas is None or not self.replicas.up_seconds:
            return None
        return model / self.replicas.up_seconds

    def _with_model(self) -> list[StageRecord]:
        return [record for record in self.stages.values() if record.model_share is not None]


def to_json(document: BaseModel) -> bytes:
    """The document as indented JSON bytes."""
    return json.dumps(document.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"
