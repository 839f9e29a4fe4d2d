"""Metrics of a run for Prometheus, through Ray's own exporter on every node.

Recorded by the driver out of the replicas' answers: what a replica did before it was lost, and
nobody answered for, is in no counter, so that nothing is counted twice. Ray exports each name with
the prefix `ray_`. `docs/grafana.json` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray.util import metrics as ray_metrics

from influence.units import Bundle
from influence.worker import UnitResult

#: Upper ends of the buckets, in seconds. Ray keeps counts alone and makes the histogram's sum up
#: from the buckets' middles: sums of time are in `influence_busy_seconds_total`.
SHARD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1800, 3600)


@dataclass(frozen=True)
class Metric:
    """One metric: its name (without Ray's prefix), its tags beside `run`, what it says."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    tags: tuple[str, ...]
    description: str

    @property
    def exported(self) -> tuple[str, ...]:
        """The names of its series in Prometheus."""
        if self.kind == "histogram":
            return tuple(f"ray_{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (f"ray_{self.name}",)


METRICS = (
    Metric(
        "influence_samples_total",
        "counter",
        ("stage",),
        "Rows of answered shards; a row counts in every stage that it passes.",
    ),
    Metric(
        "influence_tokens_total",
        "counter",
        ("stage",),
        "Tokens of those rows that can be scored, padding not counted.",
    ),
    Metric(
        "influence_shards_total",
        "counter",
        ("stage", "outcome"),
        "Answered shards: created, replaced (a damaged one), or exists (somebody was faster).",
    ),
    Metric(
        "influence_shard_seconds",
        "histogram",
        ("stage",),
        "Seconds that a computed shard had its replica to itself; replicas.shard_seconds is the "
        "limit of it. Shards that share a pass count as one.",
    ),
    Metric(
        "influence_shard_failures_total",
        "counter",
        ("stage",),
        "Shards that failed for good.",
    ),
    Metric(
        "influence_retries_total",
        "counter",
        ("stage",),
        "Attempts that ended without an answer and were made again; shards that share a pass "
        "count as one.",
    ),
    Metric(
        "influence_replicas",
        "gauge",
        ("state",),
        "Replicas that are up, and that are awaited (demanded, and not up).",
    ),
    Metric(
        "influence_model_seconds_total",
        "counter",
        ("stage",),
        "Seconds in which a model computed shards that were answered, over all replicas.",
    ),
    Metric(
        "influence_busy_seconds_total",
        "counter",
        ("stage",),
        "Seconds in which a replica was up and had work of the stage, over all replicas; the "
        "model's share of them is what a replica is used for.",
    ),
)


class RayMetrics:
    """An `influence.observer.Observer` that records into Ray's metrics.

    Args:
        run: the run directory; the tag `run` of every series.

    To be made after `ray.init`.
    """

    def __init__(self, run: str) -> None:
        self._made = {metric.name: _make(metric, run) for metric in METRICS}
        self._held = 0.0

    def replicas(self, up: int, awaited: int) -> None:
        """See `Observer`."""
        gauge = self._made["influence_replicas"]
        gauge.set(up, tags={"state": "up"})
        gauge.set(awaited, tags={"state": "awaited"})

    def held(self, bundle: Bundle, seconds: float) -> None:
        """See `Observer`."""
        self._held = seconds
        self._add("influence_busy_seconds_total", seconds, bundle)

    def retried(self, bundle: Bundle) -> None:
        """See `Observer`."""
        self._add("influence_retries_total", 1, bundle)

    def done(self, bundle: Bundle, results: Sequence[UnitResult]) -> None:
        """See `Observer`."""
        for result in results:
            self._add("influence_samples_total", result.rows, bundle)
            self._add("influence_tokens_total", result.tokens, bundle)
            self._add("influence_model_seconds_total", result.model_seconds, bundle)
            self._add("influence_shards_total", 1, bundle, outcome=result.outcome)
        if any(result.outcome != "exists" for result in results):
            histogram = self._made["influence_shard_seconds"]
            histogram.observe(self._held, tags={"stage": _stage(bundle)})

    def failed(self, bundle: Bundle, attempts: int, error: str) -> None:
        """See `Observer`."""
        self._add("influence_shard_failures_total", len(bundle.units), bundle)

    def _add(self, name: str, amount: float, bundle: Bundle, **tags: str) -> None:
        if amount > 0:  # Ray refuses to add nothing
            self._made[name].inc(amount, tags={"stage": _stage(bundle), **tags})


def _stage(bundle: Bundle) -> str:
    return bundle.units[0].stage


def _make(metric: Metric, run: str) -> Any:
    tags = ("run", *metric.tags)
    if metric.kind == "counter":
        made = ray_metrics.Counter(metric.name, metric.description, tags)
    elif metric.kind == "gauge":
        made = ray_metrics.Gauge(metric.name, metric.description, tags)
    else:
        boundaries = list(SHARD_SECONDS)
        made = ray_metrics.Histogram(metric.name, metric.description, boundaries, tags)
    return made.set_default_tags({"run": run})
