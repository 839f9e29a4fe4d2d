"""The bill's arithmetic: seconds out of speeds, hours and money out of seconds, ratios."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from influence.bill import planned_bill, ratios, settled
from influence.bill_tables import bill_table, footnotes, plan_table
from influence.config import Config
from influence.config_loading import parse_config
from influence.fingerprints import Fingerprint
from influence.plan_schemas import Amounts, Measured, MeasuredStage, ReplicaKind, StageBill
from influence.quantities import Quantities, StageWork
from influence.speeds import Speeds

MODEL = {"model": "m1", "adapter": None, "max_length": 128}
PRINT = Fingerprint("f" * 32, MODEL)
KIND = ReplicaKind(num_gpus=1, num_cpus=4, dtype="bfloat16")


def _config(**changes: Any) -> Config:
    data: dict[str, Any] = {
        "run": "runs/x",
        "model": {"name": "models/m"},
        "data": {"candidates": ["pool.jsonl"]},
        "targets": {"t": {"path": "t.jsonl"}},
        "replicas": {"max": 4},
        "prices": {"node_hour": 6.0, "replicas_per_node": 2, "currency": "EUR"},
    }
    return parse_config(data | changes)


def _measured(
    source: str,
    per_second: float,
    *,
    seconds: float = 100.0,
    values: dict[str, Any] = MODEL,
    hex_: str = PRINT.hex,
    kind: ReplicaKind = KIND,
    finished: str = "2026-01-01T00:00:00+00:00",
) -> Measured:
    stage = MeasuredStage(
        fingerprint=hex_,
        values=values,
        devices=["cuda: H100"],
        effort=per_second * seconds,
        seconds=seconds,
    )
    driver = MeasuredStage(fingerprint="", effort=seconds, seconds=seconds)
    stages = {"embedding": stage, "selection": driver}
    return Measured(
        source=source, finished=finished, replica=kind, set_up_seconds=40.0, stages=stages
    )


def _work(bundles: int, effort: float, **most: float) -> StageWork:
    least = Quantities(bundles, bundles, 10 * bundles, 100, effort, effort, 5, 7, bundles)
    top = None
    if most:
        top = Quantities(int(most["bundles"]), int(most["bundles"]), 0, 0, 0, most["effort"])
    return StageWork("embedding", least, top, PRINT, shards=bundles + 3, cached=3)


def _speeds(config: Config, *history: Measured) -> Speeds:
    return Speeds(config, None, {"embedding": PRINT}, history)


def test_hours_and_money_are_those_of_replicas_and_nodes_that_are_up() -> None:
    """10 shards of 1e12 operations each, at 2e12 a second: three rounds of 0.5 s on 4 replicas."""
    config = _config()
    selection = StageWork("selection", Quantities(effort=30.0), replicas=False)
    bill = planned_bill(
        [_work(10, 1e13), selection], config, _speeds(config, _measured("runs/a", 2e12)), 4
    )
    assert (bill.replicas, bill.nodes, bill.set_up_seconds) == (4, 2, 40.0)
    stage = bill.stages["embedding"].planned
    assert stage.seconds == pytest.approx(40.0 + 3 * 0.5)
    assert stage.gpu_hours == pytest.approx(41.5 * 4 / 3600)
    assert stage.node_hours == pytest.approx(41.5 * 2 / 3600)
    assert stage.money == pytest.approx(41.5 * 2 / 3600 * 6)
    waiting = bill.stages["selection"].planned
    assert waiting.gpu_hours == pytest.approx(30 * 4 / 3600), "replicas that wait are paid, too"
    assert bill.total.planned.money == pytest.approx(71.5 * 2 / 3600 * 6)
    assert "runs/a (2026-01-01, cuda: H100)" in bill.stages["embedding"].speed


def test_no_more_replicas_than_shards_and_half_a_node_is_paid_whole() -> None:
    config = _config(prices={"node_hour": 1.0, "replicas_per_node": 8})
    bill = planned_bill([_work(3, 1e12)], config, _speeds(config), 4)
    assert (bill.replicas, bill.nodes) == (3, 1)
    nothing = planned_bill([_work(0, 0.0)], config, _speeds(config), 4)
    assert nothing.total.planned.seconds == 0
    assert nothing.set_up == "", "nothing is to do, and a model would be loaded"
    assert planned_bill([_work(3, 1e12)], _config(prices={}), _speeds(config), 4).node_hour is None


def test_whatever_a_model_computes_first_waits_for_the_model() -> None:
    """Of the second order, too: the gradients that come before it may all be cached."""
    config = _config()
    second = {"directions", "hessian_products", "offset_vector", "offset_products"}
    first = {"embedding", "gradients", "target_gradients", "target_vectors", "inner_products"}
    for name in second | first | {"token_scores"}:
        cached = StageWork("catalogue", Quantities(1, 1, effort=1.0), shards=1)
        work = [cached, replace(_work(2, 0.0), name=name)]
        bill = planned_bill(work, config, _speeds(config, _measured("runs/a", 2e12)), 2)
        assert bill.set_up_seconds == 40.0, f"{name}: no time for loading the model"
        assert bill.stages[name].planned.seconds >= 40.0
        assert bill.stages["catalogue"].planned.seconds < 40.0
    driver = StageWork("second_order", Quantities(effort=1.0), replicas=False)
    assert planned_bill([driver], config, _speeds(config), 2).set_up == ""


def test_the_nearest_measurement_counts() -> None:
    config, work = _config(), _work(1, 1e13)
    other_model = {**MODEL, "model": "m2"}
    longer = {**MODEL, "max_length": 2048}
    cases = {
        "of the same settings": (
            _measured("b", 2.0, values=longer, hex_="a" * 32),
            _measured("a", 1.0),
        ),
        "of the same model": (
            _measured("b", 2.0, values=other_model, hex_="b" * 32),
            _measured("a", 1.0, values=longer, hex_="a" * 32),
        ),
        "of another model rather than none": (
            _measured("b", 2.0, kind=KIND.model_copy(update={"num_gpus": 0.0})),
            _measured("a", 1.0, values=other_model, hex_="b" * 32),
        ),
        "the newest that took long enough": (
            _measured("b", 2.0, seconds=3.0),
            _measured("a", 1.0),
            _measured("c", 3.0),
        ),
        "the longest if none did": (
            _measured("b", 2.0, seconds=3.0),
            _measured("a", 1.0, seconds=20.0),
        ),
    }
    for why, history in cases.items():
        speed = _speeds(config, *history).of(work)
        assert speed.per_second == pytest.approx(1.0), why
        assert "measured in a" in speed.source, why


def test_a_measurement_that_was_asked_for_comes_first() -> None:
    asked = _measured("a", 1.0, seconds=2.0, values={**MODEL, "model": "m2"}, hex_="b" * 32)
    speeds = Speeds(_config(), None, {"embedding": PRINT}, [_measured("b", 2.0)], [asked])
    assert speeds.of(_work(1, 1e13)).per_second == pytest.approx(1.0)


def test_an_assumed_speed_is_named() -> None:
    config, work = _config(), _work(1, 1e13)
    assumed = _speeds(config).of(work)
    assert assumed.source.startswith("assumed: ")
    assert "TFLOP/s" in assumed.source
    cpu = _config(replicas={"num_gpus": 0, "num_cpus": 2})
    one = _config(replicas={"num_gpus": 0, "num_cpus": 1})
    twice = _speeds(cpu).of(work).per_second / _speeds(one).of(work).per_second
    assert twice == pytest.approx(2), "a replica of two threads is as fast as one of one"


def test_a_ratio_is_one_between_least_and_most_and_by_the_nearer_one_beyond() -> None:
    planned, most = Amounts(rows=10, seconds=4.0), Amounts(rows=30, seconds=8.0)
    for rows, expected in ((10, 1.0), (20, 1.0), (30, 1.0), (5, 0.5), (60, 2.0)):
        stage = StageBill(planned=planned, at_most=most, took=Amounts(rows=rows, seconds=2.0))
        assert ratios(stage) == pytest.approx({"rows": expected, "seconds": 0.5})
    alone = StageBill(planned=planned, took=Amounts(rows=20, tokens=5, seconds=4.0))
    assert ratios(alone) == pytest.approx({"rows": 2.0, "seconds": 1.0})


def test_what_it_took_is_priced_by_the_time_that_replicas_were_up() -> None:
    config = _config()
    bill = planned_bill([_work(10, 1e13)], config, _speeds(config, _measured("a", 2e12)), 4)
    done = settled(bill, {"embedding": (Amounts(rows=100, tokens=110, seconds=50.0), 190.0)})
    took = done.stages["embedding"].took
    assert took is not None
    assert took.gpu_hours == pytest.approx(190 / 3600)
    assert took.money == pytest.approx(190 / 2 / 3600 * 6), "two replicas share a node"
    assert done.stages["embedding"].ratio["tokens"] == pytest.approx(1.1)
    assert bill.stages["embedding"].took is None, "the planned bill was changed"


def test_a_bill_of_millions_fits_into_a_hundred_columns() -> None:
    config = _config(replicas={"max": 64})
    big = Quantities(19_532, 19_532, 10**7, 2 * 10**9, 4e19, 4e19, 3 * 10**11, 2 * 10**11, 19_532)
    most = Quantities(40_000, 40_000, 4 * 10**7, 10**10, 9e20, 9e20, 10**13, 9 * 10**12, 40_000)
    work = [
        StageWork(name, big, most if name == "inner_products" else None, PRINT, 19_600, 68)
        for name in ("catalogue", "target_vectors", "inner_products", "embedding")
    ]
    work[0] = replace(work[0], least=replace(big, effort=3e10, flops=None))
    bill = planned_bill(work, config, _speeds(config), 64)
    took = {name: (Amounts(rows=10**7, seconds=4e5), 2.5e7) for name in bill.stages}
    for table in (plan_table(bill), bill_table(settled(bill, took))):
        console = Console(file=io.StringIO(), width=100)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in text, f"a cell is cut off:\n{text}"
        assert "EUR" in text
        assert "GPU-h" in text
    assert "64 replicas of 1 GPU at once on 32 nodes at 6 EUR an hour" in " ".join(footnotes(bill))
