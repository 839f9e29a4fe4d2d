"""`influence plan` as it is called: its page, its JSON document, and where its speeds come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cache_runs import call
from tiny_run import Setup, manifest_of, tiny_config, write_config

from influence import history, storage
from influence.config import Config
from influence.one_process import run_select
from influence.plan import make_plan
from influence.plan_schemas import Bill, Measured, PlanDocument, ReplicaKind, StageBill
from influence.records import to_json

PRICED = {"prices__node_hour": 2.5, "prices__currency": "EUR"}


def _speed(plan: dict[str, Any], stage: str) -> str:
    return plan["bill"]["stages"][stage]["speed"]


@pytest.fixture
def config(setup: Setup, tmp_path: Path) -> Config:
    return tiny_config(setup, tmp_path / "run", **PRICED)


def test_the_page_fits_and_the_document_says_the_same(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path, file = write_config(tmp_path / "c.yaml", config), tmp_path / "plan.json"
    code, out, err = call(["plan", path, "--json", str(file)], capsys)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out, f"a cell is cut off:\n{out}"
    document = PlanDocument.model_validate_json(file.read_bytes())
    assert document.model_dump(mode="json") == json.loads(file.read_bytes()), "values got lost"
    embedding = document.bill.stages["embedding"]
    assert (embedding.shards, embedding.cached, embedding.planned.rows) == (5, 0, 72)
    for shown in ("EUR", f"{embedding.planned.tokens:,}", "on 1 node at 2.5 EUR an hour"):
        assert shown in out, f"the page does not show {shown}"
    assert f"objects to be written: {document.bill.total.planned.objects}" in out
    assert document.counts["rows"] == 72
    assert document.memory is not None
    assert document.memory["total"] > document.memory["weights"] > 0
    assert sum(row["share"] for row in document.coverage) == pytest.approx(1)
    code, out, err = call(["plan", path, "--json", "-"], capsys)
    assert code == 0, err
    PlanDocument.model_validate_json(out)  # nothing else is on stdout


def test_speeds_are_measured_where_that_is_asked_for_and_kept(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "c.yaml", config)

    def plan(*options: str) -> dict[str, Any]:
        code, out, err = call(["plan", path, "--json", "-", *options], capsys)
        assert code == 0, err
        return json.loads(out)

    assert _speed(plan(), "embedding").startswith("assumed: ")
    measured = plan("--measure", "3")
    for stage in ("embedding", "gradients"):
        assert "measured in plan --measure" in _speed(measured, stage)
    assert measured["bill"]["set_up"] == "measured in plan --measure"
    assert measured["bill"]["stages"]["embedding"]["planned"]["seconds"] > 0
    assert _speed(plan(), "embedding") == _speed(measured, "embedding"), "it was not kept"
    elsewhere = f"cache={tmp_path / 'elsewhere'}"
    assert _speed(plan("--set", elsewhere), "embedding").startswith("assumed: ")
    assert not list(Path(config.cache_url).glob("embedding/*/*")), "a shard was committed"
    vectors = plan("--measure", "2", "--set", "gradients.projection=exact")
    for stage in ("target_vectors", "inner_products"):
        assert "measured in plan --measure" in _speed(vectors, stage)
    code, _, err = call(["plan", path, "--measure", "2", "--set", "method=random"], capsys)
    assert (code, "runs no model" in err) == (2, True), err


def test_speeds_are_those_of_a_run_that_is_named(
    config: Config, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_config(tmp_path / "run.yaml", config)
    code, out, err = call(["select", run, "--in-process"], capsys)
    assert code == 0, err
    page = Path(config.run, "report.html").read_text()
    for shown in ("planned and taken", "ratio", "EUR"):
        assert shown in out, f"the summary does not show {shown}"
        assert shown.capitalize() in page or shown in page, f"the report does not show {shown}"
    other = tiny_config(setup, tmp_path / "other", **PRICED)
    path = write_config(tmp_path / "c.yaml", other)
    code, out, err = call(["plan", path, "--json", "-", "--like", config.run], capsys)
    assert code == 0, err
    plan = json.loads(out)
    record = manifest_of(config.run).stages["embedding"]
    stage = plan["bill"]["stages"]["embedding"]
    assert f"measured in {config.run}" in stage["speed"]
    held = record.replica_seconds - record.set_up_seconds
    assert stage["planned"]["seconds"] == pytest.approx(held, rel=0.01), "the same work again"
    wider = ["--set", "replicas.num_cpus=2"]
    code, out, err = call(["plan", path, "--json", "-", "--like", config.run, *wider], capsys)
    assert code == 0, err
    assert any(
        "are not used: other replicas (num_cpus 1, here 2)" in n for n in json.loads(out)["notes"]
    )
    code, _, err = call(["plan", path, "--like", str(tmp_path / "none")], capsys)
    assert code == 2
    assert "no run there that is done" in err


def test_a_document_of_another_kind_in_the_history_is_passed_over(config: Config) -> None:
    kind = ReplicaKind(num_gpus=0, num_cpus=1, dtype="float32")
    kept = Measured(source="runs/a", finished="2026-01-01T00:00:00+00:00", replica=kind)
    history.remember(config.cache_url, kept)
    folder = storage.join(config.cache_url, "history")
    storage.put(storage.join(folder, "broken.json"), b"{")
    storage.put(
        storage.join(folder, "other.json"),
        to_json(
            Bill(
                replica=kind, replicas=1, nodes=1, node_hour=None, currency="USD", total=StageBill()
            )
        ),
    )
    assert [each.source for each in history.recall(config.cache_url)] == ["runs/a"]
    make_plan(config)


def test_what_an_earlier_run_measured_of_other_stages_stays(config: Config) -> None:
    """A run that finds all its shards in the cache measures nothing of its models."""
    run_select(config, quiet=True)
    first = history.recall(config.cache_url)[0]
    run_select(config, quiet=True)
    (second,) = history.recall(config.cache_url)
    assert second.stages["embedding"] == first.stages["embedding"]
    assert second.set_up_seconds == first.set_up_seconds
    assert second.finished > first.finished
