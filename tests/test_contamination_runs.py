"""Whole runs with planted copies of target rows in the pool: flagged, dropped, counted, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import (
    Setup,
    assert_same_results,
    manifest_of,
    results_of,
    scores_of,
    selection_of,
    shards_in,
    tiny_config,
)

from influence import storage
from influence.config import Config
from influence.errors import InputError
from influence.one_process import run_select
from influence.plan import make_plan


def _lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def planted(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """The tiny pool and a third file: copies of target rows, changed in ways that do not help."""
    folder = tmp_path_factory.mktemp("planted")
    sums = _lines(setup.targets["sums"]["path"])
    mixed = _lines(setup.targets["mixed"]["path"])
    question, answer = (turn["content"] for turn in sums[0]["messages"])
    rows = [
        {"id": "copy", "messages": sums[1]["messages"]},
        {"id": "louder", "prompt": f"{question.upper()}!", "completion": "green bread"},
        {
            "id": "within",
            "prompt": "Read this. " + " ".join(turn["content"] for turn in mixed[2]["messages"]),
            "completion": "half a boat",
        },
        {"id": "again", "messages": sums[1]["messages"]},
    ]
    assert answer  # the other answer is not the test's
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Setup(setup.model, folder, [*setup.candidates, str(path)], setup.targets)


PLANTED = {"copy": "sums:sums1", "louder": "sums:sums0", "within": "mixed:mixed2"}


def _config(planted: Setup, folder: Path, name: str, **changes: Any) -> Config:
    cache = {"cache": str(folder / "cache"), "selection__budget": 30, **changes}
    return tiny_config(planted, folder / name, **cache)


@pytest.fixture(scope="module")
def runs(planted: Setup, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run with each action, and one with the section switched off."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for action in ("flag", "drop", "keep", "null"):
        changes = {"contamination": None} if action == "null" else {}
        if action in ("drop", "keep"):
            changes = {"contamination__action": action}
        config = _config(planted, folder, action, method="exact", **changes)
        run_select(config, quiet=True)
        made[action] = config.run
    return made


def test_planted_rows_are_found_and_no_others(runs: dict[str, str]) -> None:
    rows = {row["id"]: row for row in scores_of(runs["flag"]).to_pylist()}
    found = {name: row["contamination"] for name, row in rows.items() if row["contamination"]}
    assert found == {**PLANTED, "again": "sums:sums1"}
    assert rows["copy"]["overlap"] == rows["louder"]["overlap"] == 1.0
    assert rows["within"]["overlap"] > 0.5
    counts = manifest_of(runs["flag"]).counts["contamination"]
    assert counts["all"]["rows"] == 3, "a duplicate of an earlier row counts with that one"
    assert {kind: found["rows"] for kind, found in counts["kinds"].items()} == {
        "exact": 2,
        "ngram": 1,
        "minhash": 0,
    }
    assert {name: found["rows"] for name, found in counts["targets"].items()} == {
        "sums": 2,
        "mixed": 1,
    }


def test_flagging_changes_no_number(runs: dict[str, str]) -> None:
    flagged, plain = scores_of(runs["flag"]), scores_of(runs["null"])
    assert flagged.drop_columns(["contamination", "overlap"]).equals(plain), (
        "flagging changed a score"
    )
    selected = selection_of(runs["flag"])
    others = selection_of(runs["null"])
    ours = ("influence_contamination", "influence_overlap")
    assert [{k: v for k, v in row.items() if k not in ours} for row in selected] == others
    of_scores = {row["id"]: row["contamination"] for row in flagged.to_pylist()}
    chosen = {row["id"]: row["influence_contamination"] for row in selected if row["id"]}
    assert chosen == {name: of_scores[name] for name in chosen}, "another label than in scores/"
    marked = sum(row["influence_contamination"] is not None for row in selected)
    assert marked == manifest_of(runs["flag"]).counts["contamination"]["all"]["selected"]
    assert marked, "the planted rows are not selected: the test shows nothing"


def test_keeping_counts_and_writes_what_no_section_writes(runs: dict[str, str]) -> None:
    assert_same_results(runs["keep"], runs["null"], "rows that are kept left a trace")
    counts = manifest_of(runs["keep"]).counts["contamination"]
    flagged = manifest_of(runs["flag"]).counts["contamination"]
    assert {**counts, "action": "flag"} == flagged
    assert "contamination" not in manifest_of(runs["null"]).counts


def test_dropped_rows_are_never_selected_and_say_why(runs: dict[str, str]) -> None:
    rows = {row["id"]: row for row in scores_of(runs["drop"]).to_pylist()}
    for name, target in PLANTED.items():
        assert rows[name]["reason"] == "contaminated"
        assert rows[name]["score"] is None
        assert rows[name]["weight"] == 0
        assert rows[name]["contamination"] == target
    assert rows["again"]["reason"] == "duplicate"
    counts = manifest_of(runs["drop"]).counts
    assert counts["reasons"]["contaminated"] == 3
    assert counts["contamination"]["all"] == {"rows": 3, "selected": 0}
    assert counts["scored"] == manifest_of(runs["null"]).counts["scored"] - 3
    ids = {row["id"] for row in selection_of(runs["drop"])}
    assert not ids & {*PLANTED, "again"}, "a contaminated row was selected"
    assert {row["id"] for row in selection_of(runs["null"])} & set(PLANTED)


def test_dropping_is_as_if_the_rows_were_not_there(
    runs: dict[str, str], planted: Setup, setup: Setup, tmp_path: Path
) -> None:
    config = tiny_config(
        setup, tmp_path / "without", method="exact", contamination=None, selection__budget=30
    )
    run_select(config, quiet=True)
    with_planted = selection_of(runs["drop"])
    ours = ("influence_contamination", "influence_overlap")
    left = [{k: v for k, v in row.items() if k not in ours} for row in with_planted]
    assert left == selection_of(config.run), "dropped rows left a trace in the selection"


def test_the_report_shows_the_worst_with_escaped_text(runs: dict[str, str]) -> None:
    document = json.loads(storage.read_bytes(storage.join(runs["flag"], "contamination.json")))
    assert {row["id"] for row in document["examples"]} == set(PLANTED)
    ranks = [row["rank"] or 10**9 for row in document["examples"]]
    assert (ranks[0] < 10**9) >= (ranks[-1] < 10**9), "selected rows come first"
    page = storage.read_bytes(storage.join(runs["flag"], "report.html")).decode()
    assert 'id="contamination"' in page
    assert "sums:sums1" in page
    page = storage.read_bytes(storage.join(runs["null"], "report.html")).decode()
    assert 'id="contamination"' not in page


def test_shards_are_reused_and_made_anew_for_other_texts_only(
    planted: Setup, tmp_path: Path
) -> None:
    def run(name: str, **changes: Any) -> set[str]:
        config = _config(planted, tmp_path, name, method="random", **changes)
        before = shards_in(config.cache_url)
        run_select(config, quiet=True)
        made = shards_in(config.cache_url) - before
        return {key for key in made if key.startswith("contamination/")}

    first = run("first")
    assert len(first) == 3 + 2 + 1, "a shard for every range of a file"
    assert not run("again"), "the same texts were compared again"
    assert not run("drop", contamination__action="drop"), "the action is no part of the matches"
    assert len(run("other", contamination__overlap=0.9)) == 6
    fewer = {name: {**each, "limit": 3} for name, each in planted.targets.items()}
    assert len(run("fewer", targets=fewer)) == 6, "other target rows need another comparison"
    renamed = {f"x{name}": each for name, each in planted.targets.items()}
    assert not run("renamed", targets=renamed), "a name is no text"


def test_a_run_does_not_depend_on_the_size_of_its_shards(planted: Setup, tmp_path: Path) -> None:
    found = []
    for rows in (5, 1000):
        config = _config(
            planted, tmp_path, f"of{rows}", method="random", replicas__rows_per_shard=rows
        )
        run_select(config, quiet=True)
        found.append(config.run)
    assert results_of(found[0]) == results_of(found[1])


def test_a_plan_counts_the_stage_and_what_is_dropped(planted: Setup, tmp_path: Path) -> None:
    drop = {"method": "random", "contamination__action": "drop"}
    config = _config(planted, tmp_path, "planned", **drop)
    plan = make_plan(config)
    stage = plan.work.stages["contamination"]
    assert (stage.shards, stage.cached, stage.missing) == (6, 6, ()), "it is made for the plan"
    assert plan.counts["reasons"]["contaminated"] == 3, "the plan counts rows that are dropped"
    run_select(config, quiet=True)
    bill = manifest_of(config.run).bill
    assert bill is not None
    assert bill.stages["contamination"].planned.shards == 0
    fresh = _config(planted, tmp_path, "fresh", **drop, cache=str(tmp_path / "other"))
    run_select(fresh, quiet=True)
    bill = manifest_of(fresh.run).bill
    assert bill is not None
    stage = bill.stages["contamination"]
    assert stage.took is not None
    assert stage.planned.shards == stage.took.shards == 6
    assert stage.planned.rows == stage.took.rows == manifest_of(fresh.run).counts["rows"]
    assert_same_results(config.run, fresh.run, "shards of a plan gave other results")


def test_a_damaged_shard_is_made_anew(planted: Setup, tmp_path: Path) -> None:
    config = _config(planted, tmp_path, "first", method="random")
    run_select(config, quiet=True)
    key = next(key for key in sorted(shards_in(config.cache_url)) if key.startswith("contam"))
    path = Path(config.cache_url, key)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = _config(planted, tmp_path, "again", method="random")
    run_select(again, quiet=True)
    assert path.read_bytes() == whole, "half a shard was believed, or another one was made"
    assert manifest_of(again.run).stages["contamination"].damaged == 1
    assert_same_results(config.run, again.run, "a damaged shard changed the results")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contamination__against": {"sums": "FILE"}}, "against.sums: a target has this name"),
        ({"contamination__against": {"held": "nowhere.jsonl"}}, "contamination.against.held"),
    ],
)
def test_further_files_have_names_and_places(
    planted: Setup, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    named = changes["contamination__against"]
    known = {
        name: path.replace("FILE", planted.targets["sums"]["path"]) for name, path in named.items()
    }
    config = _config(planted, tmp_path, "run", method="random", contamination__against=known)
    with pytest.raises(InputError, match=words):
        run_select(config, quiet=True)


def test_further_files_are_looked_for(planted: Setup, tmp_path: Path) -> None:
    """The test set of an evaluation, which is no target."""
    held_out = tmp_path / "test.jsonl"
    row = json.loads((Path(planted.folder) / "c.jsonl").read_text().splitlines()[2])
    held_out.write_text(json.dumps({"prompt": row["prompt"], "completion": "no"}) + "\n")
    config = _config(
        planted, tmp_path, "run", method="random", contamination__against={"held": str(held_out)}
    )
    run_select(config, quiet=True)
    rows = {row["id"]: row for row in scores_of(config.run).to_pylist()}
    assert rows["within"]["contamination"] == "held:test.jsonl:0", "the exact match is the better"
    assert rows["within"]["overlap"] == 1.0
