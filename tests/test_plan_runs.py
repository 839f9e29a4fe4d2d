"""A plan against the run that follows it: the same shards, rows, tokens, operations and bytes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, conversation, manifest_of, shards_in, third_target, tiny_config

from influence import history, storage
from influence.config import Config
from influence.errors import StorageError
from influence.one_process import run_select
from influence.plan import Plan, make_plan
from influence.plan_schemas import Bill

#: How far a run may be from its plan, by the stages that a tolerance is for. Everything else that
#: is counted (shards, rows, tokens, operations, objects) has to be equal.
BYTES = {"scores": 0.3, "token_scores": 0.3, "selection": 0.4}
OTHER_BYTES = 0.02
COUNTED = ("shards", "rows", "tokens", "flops", "objects")
MODEL_STAGES = ("embedding", "gradients", "target_vectors", "inner_products")
CERTIFIED = {
    "landmarks__choose": "certified",
    "landmarks__count": 4096,
    "landmarks__initial": 12,
    "landmarks__audit": 6,
    "landmarks__recall": 0.5,
    "replicas__gradient_rows_per_shard": 4,
}


def _bill(config: Config) -> Bill:
    bill = manifest_of(config.run).bill
    assert bill is not None, "the run kept no bill"
    return bill


def _to_do(plan: Plan) -> dict[str, int]:
    """Shards to compute of the stages with a model that have any."""
    work = {
        name: plan.work.stages[name].least.shards
        for name in MODEL_STAGES
        if name in plan.work.stages
    }
    return {name: shards for name, shards in work.items() if shards}


def planned_and_run(config: Config) -> Plan:
    """Plan, run, and hold one against the other."""
    plan = make_plan(config)
    before = shards_in(config.cache_url)
    run_select(config, quiet=True)
    made = shards_in(config.cache_url) - before
    missing = {key for stage in plan.work.stages.values() for key in stage.missing}
    assert made == missing, "the run computed other shards than the plan listed as missing"
    done = _bill(config)
    assert done.stages.keys() == plan.bill.stages.keys()
    for name, stage in done.stages.items():
        foretold = plan.bill.stages[name]
        assert stage.planned.model_copy(update=_times(foretold)) == foretold.planned, (
            f"{name}: the run's own plan is not the one of `influence plan`"
        )
        assert stage.took is not None
        for what in COUNTED:
            planned, took = getattr(stage.planned, what), getattr(stage.took, what)
            if planned is not None and took is not None:
                assert took == planned, f"{name}: {what} planned {planned}, took {took}"
        expected, written = stage.planned.written_bytes or 0, stage.took.written_bytes
        assert written == pytest.approx(expected, rel=BYTES.get(name, OTHER_BYTES)), (
            f"{name}: bytes are not those that were planned"
        )
    assert done.total.ratio["tokens" if missing else "objects"] == pytest.approx(1)
    return plan


def _times(bill: Any) -> dict[str, Any]:
    names = ("seconds", "gpu_hours", "node_hours", "money")
    return {name: getattr(bill.planned, name) for name in names}


def _more(folder: Path) -> str:
    """A third file of candidates: 20 rows, one of which cannot be scored, and one twice."""
    draw, path = random.Random(5), folder / "c.jsonl"
    rows: list[Any] = [{"messages": conversation(draw)} for _ in range(18)]
    rows += [rows[2], {"prompt": "nothing", "completion": " "}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("projection", ["kronecker", "exact"])
def test_a_run_computes_what_the_plan_lists(setup: Setup, tmp_path: Path, projection: str) -> None:
    """First run, the same again, a new target, a new budget, a new file, another length limit."""
    cache: dict[str, Any] = {"cache": str(tmp_path / "cache"), "prices__node_hour": 2.0}
    cache |= {"gradients__projection": projection, "landmarks__count": 20}
    targets = {**setup.targets, "third": third_target(tmp_path)}
    pool = [*setup.candidates, _more(tmp_path)]

    def step(name: str, **changes: Any) -> Plan:
        return planned_and_run(tiny_config(setup, tmp_path / name, **{**cache, **changes}))

    first = step("first")
    sketches = projection == "kronecker"
    stages = ("gradients",) if sketches else ("target_vectors", "inner_products")
    assert _to_do(first).keys() == {"embedding", *stages}
    assert first.bill.total.planned.money, "no money although the config names a price"
    again = step("again")
    assert _to_do(again) == {}, "the same run again would cost something"
    assert again.bill.set_up == "", "a model is loaded for nothing"
    budget = step("budget", selection__budget="30%")
    assert _to_do(budget) == {}, "a new budget would cost gradients or embeddings"
    target = step("target", targets=targets)
    if sketches:
        assert _to_do(target) == {"gradients": 1}, "not the new target's own rows alone"
        assert target.work.stages["gradients"].least.rows == 3
    else:
        candidates = first.work.stages["inner_products"].shards // 2  # for each of two targets
        assert _to_do(target) == {"target_vectors": 1, "inner_products": candidates}
    file = step("file", data__candidates=pool)
    assert _to_do(file)["embedding"] == 2, "not the new file's own shards alone"
    assert all(
        key.split("/")[2].startswith(_hash(file, "c.jsonl"))
        for key in file.work.stages["embedding"].missing
    )
    length = step("length", data__max_length=100)
    assert _to_do(length).keys() == _to_do(first).keys()
    notes = " ".join(length.notes)
    assert "all anew: " in notes
    assert "max_length was 128, is now 100" in notes, "it is not said why nothing fits"
    assert "all anew" not in " ".join(file.notes + target.notes), "new rows are no new settings"


def _hash(plan: Plan, name: str) -> str:
    rows = plan.work.stages["embedding"].missing
    assert rows, f"{name} would not be embedded"
    return rows[0].split("/")[2].split("-")[0]


@pytest.mark.parametrize("method", ["exact", "rds", "random"])
def test_the_other_methods_do_what_the_plan_lists(
    setup: Setup, tmp_path: Path, method: str
) -> None:
    config = tiny_config(setup, tmp_path / "run", method=method)
    plan = planned_and_run(config)
    assert bool(_to_do(plan)) == (method != "random")


def test_whole_gradients_are_as_large_as_the_plan_says(setup: Setup, tmp_path: Path) -> None:
    planned_and_run(tiny_config(setup, tmp_path / "run", gradients__projection="none"))


@pytest.mark.parametrize("projection", ["kronecker", "exact"])
def test_certified_rounds_stay_between_their_least_and_their_most(
    setup: Setup, tmp_path: Path, projection: str
) -> None:
    changes: dict[str, Any] = {**CERTIFIED, "cache": str(tmp_path / "cache")}
    changes["gradients__projection"] = projection
    config = tiny_config(setup, tmp_path / "run", **changes)
    plan = make_plan(config)
    name = "gradients" if projection == "kronecker" else "inner_products"
    run_select(config, quiet=True)
    stage = _bill(config).stages[name]
    assert stage.at_most is not None
    assert stage.took is not None
    for what in ("shards", "rows", "tokens", "flops", "written_bytes", "objects"):
        low, took = getattr(stage.planned, what), getattr(stage.took, what)
        most = getattr(stage.at_most, what)
        assert 0 < low < took <= most, f"{what}: {took} is not between {low} and {most}"
    targets = 11 if projection == "kronecker" else 0
    assert stage.planned.rows == 12 + targets, "the first landmarks are the least"
    assert stage.at_most.rows == 64 + targets, "every row that can be scored is the most"
    assert any(note.startswith("certified: from 12 landmarks") for note in plan.notes)
    again = tiny_config(setup, tmp_path / "again", **changes)
    told = planned_and_run(again)
    assert _to_do(told) == {}
    assert told.bill.total.at_most is None, "the rounds are known: there is no range any more"
    assert any("the rounds are those of" in note for note in told.notes)
    other = make_plan(tiny_config(setup, tmp_path / "other", **changes, selection__budget=20))
    assert other.bill.stages[name].at_most is not None, "another budget asks for other rows"
    assert _to_do(other) == {}, "the first landmarks are there"
    further = stage.took.rows - stage.planned.rows  # type: ignore[operator]
    told_of = re.search(rf"{name}: the cache holds about (\d+) further rows", " ".join(other.notes))
    assert told_of is not None
    assert int(told_of[1]) == pytest.approx(further, rel=0.1)


def test_what_is_read_is_about_what_the_plan_says(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of the cache, of the scores and of the inputs (JSONL, which is read whole)."""
    pool = [str(setup.folder / "pool" / "b.jsonl"), _more(tmp_path)]
    cache = {"cache": str(tmp_path / "cache"), "data__candidates": pool}
    targets = {**setup.targets, "third": third_target(tmp_path)}
    tally = _tally_of_reads(monkeypatch)
    for name, changes in (("first", {}), ("second", {"targets": targets})):
        config = tiny_config(setup, tmp_path / name, **cache, **changes)
        make_plan(config)  # the catalogue: what it takes is not known beforehand
        tally.clear()
        run_select(config, quiet=True)
        wanted = ("/cache/", "/scoring/", ".jsonl")
        read = sum(size for url, size in tally if any(part in url for part in wanted))
        planned = _bill(config).total.planned.read_bytes
        assert planned == pytest.approx(read, rel=0.1), f"{name}: planned {planned}, read {read}"


def _tally_of_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    tally: list[tuple[str, int]] = []
    read, opened = storage.read_bytes, storage.open_input

    def read_bytes(url: str) -> bytes:
        data = read(url)
        tally.append((url, len(data)))
        return data

    def open_input(url: str) -> Any:
        tally.append((url, Path(url).stat().st_size))
        return opened(url)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    monkeypatch.setattr(storage, "open_input", open_input)
    return tally


def test_a_run_that_cannot_keep_its_speeds_is_done_all_the_same(
    setup: Setup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: object) -> None:
        raise StorageError("no room for notes")

    monkeypatch.setattr(history, "remember", refused)
    config = tiny_config(setup, tmp_path / "run", method="random")
    run_select(config)
    assert manifest_of(config.run).state == "done"
    assert _bill(config).total.took is not None
    assert "no room for notes" in capsys.readouterr().err
