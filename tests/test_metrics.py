"""Metrics on a real Ray: counters that agree with the manifest, and a dashboard that uses them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from tiny_run import Setup, manifest_of, tiny_config

from influence import one_process
from influence.config import Config
from influence.errors import ShardsFailedError
from influence.worker import Worker
from ray_jobs import select as select_job
from ray_jobs.metrics import METRICS

pytestmark = pytest.mark.clusters

DASHBOARD = Path(__file__).parent.parent / "docs" / "grafana.json"
#: (sum over the series of one name, run and the given labels)
Read = Callable[..., float]


def scrape() -> str:
    """What the nodes' Prometheus endpoints answer, on loopback."""
    pages = []
    for node in ray.nodes():
        if node["Alive"]:
            address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(address, timeout=10) as answer:
                pages.append(answer.read().decode())
    return "".join(pages)


def reader(run: str) -> Read:
    """A function of (name, **labels): the sum of a run's series in one scrape."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(scrape()):
        for sample in family.samples:
            if sample.labels.get("run") == run:
                samples[sample.name].append((sample.labels, sample.value))

    def read(name: str, **labels: str) -> float:
        return sum(v for have, v in samples[name] if labels.items() <= have.items())

    return read


def wait_for(run: str, arrived: Callable[[Read], bool]) -> Read:
    """Ray reports every few seconds: poll until `arrived`, 30 s at most."""
    deadline = time.monotonic() + 30
    while not arrived(read := reader(run)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return read


@pytest.mark.usefixtures("ray_cluster")
def test_the_counters_say_what_the_manifest_says(setup: Setup, tmp_path: Path) -> None:
    # With inner products, for shards of two targets that share one pass.
    changes: dict[str, Any] = {"gradients__projection": "exact", "replicas__max": 2}
    config = tiny_config(setup, tmp_path / "run", **changes)
    select_job.run_select(config, quiet=True)
    stages = manifest_of(config.run).stages
    made = {name: record for name, record in stages.items() if record.computed}
    without_model = {"catalogue", "contamination"}
    assert made.keys() == {*without_model, "target_vectors", "inner_products", "embedding"}
    rows = sum(record.rows for record in made.values())
    read = wait_for(config.run, lambda read: read("ray_influence_samples_total") >= rows)
    for stage, record in made.items():
        passes = record.computed / (2 if stage == "inner_products" else 1)
        expected = {
            "ray_influence_samples_total": record.rows,
            "ray_influence_tokens_total": record.tokens,
            "ray_influence_shards_total": record.computed + record.reused,
            "ray_influence_shard_seconds_count": passes,
            "ray_influence_model_seconds_total": record.model_seconds,
            "ray_influence_busy_seconds_total": record.replica_seconds,
        }
        found = {name: read(name, stage=stage) for name in expected}
        assert found == pytest.approx(expected), f"{stage}: counters and manifest disagree"
    assert read("ray_influence_shard_failures_total") == 0
    assert read("ray_influence_retries_total") == 0
    model = sum(record.model_seconds + record.set_up_seconds for record in made.values())
    held = sum(record.replica_seconds for record in made.values())
    assert 0 < model < held, "more time in the model than replicas had: time is counted twice"
    again = tiny_config(setup, tmp_path / "again", cache=config.cache_url, **changes)
    select_job.run_select(again, quiet=True)
    time.sleep(11)  # longer than Ray's interval
    assert reader(again.run)("ray_influence_samples_total") == 0, "reused shards count as computed"


@pytest.mark.usefixtures("ray_cluster")
def test_failures_and_what_was_found_are_counted_apart(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard fails for good, one is committed by a replica that dies before it says so."""
    plain = tiny_config(setup, tmp_path / "plain", method="rds")
    one_process.run_select(plain, quiet=True)
    config = tiny_config(setup, tmp_path / "run", method="rds", replicas__retries=1)
    mark = tmp_path / "died"

    def troubled(given: Config) -> Callable[[], Any]:
        class Troubled:  # local, so that it travels by value
            def __init__(self, document: dict[str, Any]) -> None:
                self.worker = Worker(Config.model_validate(document))

            def ready(self) -> None: ...

            def run(self, bundle: Any) -> Any:
                unit = bundle.units[0]
                pool = unit.stage == "embedding" and "a.parquet" in unit.file.url
                if pool and unit.first == 16:
                    raise FloatingPointError("this shard is poison")
                results = self.worker.run(bundle)
                if pool and unit.first == 0 and not mark.exists():
                    mark.touch()
                    import os

                    os._exit(1)
                return results

        actor: Any = ray.remote(max_restarts=0)(Troubled).options(num_cpus=1)
        document = given.model_dump(mode="json")
        return lambda: actor.remote(document)

    monkeypatch.setattr(select_job, "replica_factory", troubled)
    with pytest.raises(ShardsFailedError):
        select_job.run_select(config, quiet=True)
    assert mark.exists(), "no replica died: test too weak"
    read = wait_for(config.run, lambda r: r("ray_influence_shard_failures_total") >= 1)
    embedding = manifest_of(config.run).stages["embedding"]
    whole = manifest_of(plain.run).stages["embedding"]
    assert read("ray_influence_shard_failures_total", stage="embedding") == 1
    assert read("ray_influence_retries_total", stage="embedding") >= 2, (
        "one retry of the poisoned shard, and the dead replica's"
    )
    found = read("ray_influence_shards_total", stage="embedding", outcome="exists")
    assert found == embedding.reused >= 1, "the dead replica's shard was not found committed"
    assert read("ray_influence_shard_seconds_count", stage="embedding") == embedding.computed
    counted = read("ray_influence_samples_total", stage="embedding")
    lost = 2 * config.replicas.rows_per_shard  # of the poisoned shard, and of the one found
    assert counted == embedding.rows == whole.rows - lost, "a killed replica's rows are counted"


def exported() -> dict[str, set[str]]:
    """The labels that every exported series has, by name."""
    return {
        name: {"run", *metric.tags, *({"le"} if name.endswith("_bucket") else ())}
        for metric in METRICS
        for name in metric.exported
    }


def expressions() -> Iterator[str]:
    """Every PromQL expression of the dashboard: of panels and of variables."""
    document = json.loads(DASHBOARD.read_text())
    for panel in document["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert asked, f"unknown form of a variable: {variable['query']}"
            yield f"sum by ({asked[2]}) ({asked[1]})"


_WORDS = {"by", "without", "or", "and", "unless", "on", "ignoring", "offset", "bool"}


def series_of(expression: str) -> set[str]:
    """Names in a PromQL expression that are no functions, keywords, labels or durations."""
    plain = re.sub(r'"[^"]*"|\[[^\]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)', " ", expression)
    plain = re.sub(r"\{[^}]*\}", " ", plain)
    names = set(re.findall(r"[A-Za-z_:][\w:]*\b(?!\s*\()", plain))
    return names - _WORDS


def test_the_reader_of_expressions_finds_what_it_should() -> None:
    text = 'histogram_quantile(0.5, sum by (le, stage) (rate(a_bucket{run=~"$run"}[5m]))) / b_total'
    assert series_of(text) == {"a_bucket", "b_total"}
    assert series_of('60 * sum (c{x="d"}) or vector(0)') == {"c"}


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_the_dashboard_asks_for_what_is_exported(expression: str) -> None:
    known, used = exported(), series_of(expression)
    assert used, f"no series in {expression}"
    assert used <= known.keys(), f"not exported: {used - known.keys()}"
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    for group in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        labels |= {label.strip() for label in group.split(",")}
    for name in used:
        assert labels <= known[name], f"{name} has no label {labels - known[name]}"


def test_the_dashboard_shows_every_metric() -> None:
    asked = {name for expression in expressions() for name in series_of(expression)}
    for metric in METRICS:
        assert asked & set(metric.exported), f"no panel shows {metric.name}"


def test_the_dashboard_can_be_imported() -> None:
    document = json.loads(DASHBOARD.read_text())
    assert document["id"] is None, "an id of somebody's Grafana would overwrite another dashboard"
    assert document["schemaVersion"] >= 39
    kinds = {variable["name"]: variable["type"] for variable in document["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "run": "query"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids), "two panels share an id"
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        assert panel["type"] in ("stat", "timeseries")
        for each in (panel, *panel["targets"]):
            assert each["datasource"] == source, f"{panel['title']}: a data source of its own"
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, f"{panel['title']} is out of the grid"
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
