"""What is printed: names out of the data stand as they are, whatever they look like."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from influence import plan, plan_tables, storage
from influence.config_loading import dump_config, parse_config
from influence.plan_schemas import Bill, ReplicaKind, StageBill
from influence.planned_work import Work
from influence.records import FailedShard, Fidelity, Manifest, StageRecord, to_json
from influence.status import print_status, read_status
from influence.summary import certificate_table, source_table

ODD = ["[/b] x", "[en] wiki", "[bold]loud[/bold]", "[link=x", "\\[en]", ":smile:"]


def _printed(*things: Any) -> str:
    console = Console(file=io.StringIO(), width=300)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ODD)
def test_names_out_of_the_data_are_printed_as_they_are(name: str):
    fidelity = Fidelity.model_validate(
        {"method": "influence_distillation", "exact": False, "targets": {name: {}}}
    )
    exact = fidelity.model_copy(update={"exact": True})
    tables = {
        "sources": source_table({name: (5, 2), "plain": (5, 0)}),
        "certificate": certificate_table(fidelity),
        "exact certificate": certificate_table(exact),
        "coverage": plan_tables.coverage_table(
            [
                {"group": name, "parameters": 5, "share": 1.0, "rule": None, "attributed": True},
                {
                    "group": "g",
                    "parameters": 5,
                    "share": 1.0,
                    "rule": "linear",
                    "attributed": False,
                    "reason": name,
                },
            ]
        ),
    }
    for what, table in tables.items():
        assert name in _printed(table), f"{what}: a name was read as markup"


def test_a_plan_prints_names_and_reasons_as_they_are():
    config = parse_config(_data("runs/x"))
    target = {"scored": 1, "rows": 1, "columns": 1, "tokens": 1}
    counts: dict[str, Any] = dict.fromkeys(
        ("rows", "tokens", "response_tokens", "scored", "duplicates", "truncated"), 1
    )
    counts |= {"reasons": dict.fromkeys(ODD, 1), "targets": dict.fromkeys(ODD, target)}
    kind = ReplicaKind(num_gpus=0, num_cpus=1, dtype="float32")
    bill = Bill(replica=kind, replicas=1, nodes=1, node_hour=None, currency="USD")
    bill.stages["embedding"] = StageBill(speed=ODD[0])
    made = plan.Plan(config, counts, Work(), bill, None, "1 row", notes=[*ODD])
    console = Console(file=io.StringIO(), width=300)
    plan_tables.print_plan(made, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ODD:
        assert f"not scored, {name}: 1" in text
        assert f"target {name}: 1 of 1" in text
        assert f"note: {name}" in text
    assert f"speed of embedding: {ODD[0]}" in text


def _data(run: str) -> dict[str, Any]:
    return {
        "run": run,
        "model": {"name": "models/m"},
        "data": {"candidates": ["pool.jsonl"]},
        "targets": {"t": {"path": "t.jsonl"}},
    }


@pytest.mark.parametrize("name", ODD)
def test_a_status_prints_files_and_errors_as_they_are(name: str, tmp_path):
    run = str(tmp_path / "run")
    failed = FailedShard(
        key="k", file=f"pool/{name}.jsonl", first=0, last=3, attempts=2, error=f"Error: {name}"
    )
    record = StageRecord(fingerprint="f", failed=[failed])
    manifest = Manifest(method="exact", stages={"embedding": record})
    storage.put(storage.join(run, "manifest.json"), to_json(manifest))
    storage.put(storage.join(run, "config.yaml"), dump_config(parse_config(_data(run))).encode())
    console = Console(file=io.StringIO(), width=300)
    print_status(read_status(run), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"failed: pool/{name}.jsonl rows 0-3 after 2 attempts: Error: {name}" in text
