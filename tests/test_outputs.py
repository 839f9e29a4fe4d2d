"""What a run hands out: nothing of the input is lost, every number stands at its row."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import pytest
from shard_tables import one_catalogue

from influence import outputs, storage
from influence.candidates import scan_files
from influence.catalogue import Catalogue
from influence.score_table import ArrayTable, ScoreBlock
from influence.selected import extremes
from influence.selection import Selection
from influence.target_columns import Column, TargetColumns

ADDED = ("influence_rank", "influence_score", "influence_weight")


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"ask {text}"}, {"role": "assistant", "content": text}]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _catalogue(*paths: Path, **columns: Any) -> Catalogue:
    files = scan_files([str(path) for path in paths])
    return one_catalogue(*[(file, columns) for file in files])


def _selection(order: list[int], weights: list[float], n_scored: int) -> Selection:
    k = len(order)
    numbers = np.array(weights, dtype=np.float64)
    assert numbers.sum() == pytest.approx(n_scored), "weights sum to the number of scored rows"
    return Selection(
        order=np.array(order),
        weights=numbers,
        column=np.zeros(k, np.int64),
        score=np.zeros(k),
        tau=np.zeros(1),
        groups=(),
        n_scored=n_scored,
        budget_exceeds_pool=False,
    )


def _read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))])


def _lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON: strict readers refuse the file")

    text = path.read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


@pytest.fixture
def pool(tmp_path) -> tuple[list[dict[str, Any]], Catalogue]:
    """Six rows in two files with nested and odd columns, some in one file only."""
    rows: list[dict[str, Any]] = [
        {"messages": _messages("a"), "id": "a", "tags": ["x", "y"], "extra": {"n": 1, "s": None}},
        {"messages": _messages("bé\n\u2028"), "id": "b", "tags": [], "extra": None},
        {"messages": _messages("c"), "id": None, "tags": None, "extra": {"n": 2, "s": "t"}},
        {"messages": _messages("d"), "id": "d", "quality": 0.25},
        {"messages": _messages("e"), "id": "e", "quality": None},
        {"messages": _messages("f"), "id": "f", "quality": -1.5},
    ]
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "a.parquet")
    _jsonl(tmp_path / "b.jsonl", rows[3:])
    return rows, _catalogue(tmp_path / "a.parquet", tmp_path / "b.jsonl")


def test_selected_rows_keep_their_columns_in_rank_order(tmp_path, pool):
    rows, catalogue = pool
    order, scores = [4, 1, 5, 0], np.array([0.5, 0.25, np.nan, -1.0, 1.0, 0.125])
    run = str(tmp_path / "run")
    selection = _selection(order, [2.0, 1.5, 1.0, 0.5], 5)
    returned = outputs.write_selection(run, catalogue, selection, scores[order])
    table = _read(tmp_path / "run" / "selection")
    assert table.equals(returned)
    names = ["messages", "id", "tags", "extra", "quality"]
    assert table.column_names == [*names, *ADDED], "an input column is lost or renamed"
    for rank, (position, found) in enumerate(zip(order, table.to_pylist(), strict=True), start=1):
        given = {name: rows[position].get(name) for name in names}
        assert {name: found[name] for name in names} == given, "values of another row"
        assert found["influence_rank"] == rank
        assert found["influence_score"] == scores[position]
    weights = table.column("influence_weight").to_numpy()
    assert weights.mean() == pytest.approx(1.0, rel=1e-12), "trainers expect weights of mean 1"
    np.testing.assert_allclose(weights, np.array([2.0, 1.5, 1.0, 0.5]) * 4 / 5, rtol=1e-12)


def test_the_jsonl_equals_the_parquet_line_by_line(tmp_path, pool):
    _, catalogue = pool
    selection = _selection([1, 2, 3], [2, 2, 2], 6)
    outputs.write_selection(str(tmp_path / "run"), catalogue, selection, np.array([1.0, 2, 3]))
    lines = _lines(tmp_path / "run" / "selection.jsonl")
    assert lines == _read(tmp_path / "run" / "selection").to_pylist()
    data = (tmp_path / "run" / "selection.jsonl").read_bytes()
    read = pa_json.read_json(io.BytesIO(data))  # what `datasets` reads JSON with
    assert read.column("influence_rank").to_pylist() == [1, 2, 3]


def test_numbers_that_json_does_not_have_become_null_there_only(tmp_path):
    rows = [
        {"messages": _messages("a"), "x": float("nan"), "in": {"y": [float("inf"), 1.0]}},
        {"messages": _messages("b"), "x": 2.0, "in": {"y": []}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    selection = _selection([0, 1], [1, 1], 2)
    catalogue = _catalogue(tmp_path / "a.parquet")
    outputs.write_selection(str(tmp_path / "run"), catalogue, selection, np.ones(2))
    lines = _lines(tmp_path / "run" / "selection.jsonl")
    assert [line["x"] for line in lines] == [None, 2.0]
    assert lines[0]["in"] == {"y": [None, 1.0]}
    table = _read(tmp_path / "run" / "selection").to_pylist()
    assert np.isnan(table[0]["x"])
    assert table[0]["in"]["y"] == [float("inf"), 1.0]


def test_columns_that_clash_become_json_and_only_those(tmp_path):
    a = {"messages": _messages("a"), "meta": ["x", {"y": 1}], "n": 1, "half": 1}
    b = {"messages": _messages("b"), "meta": "plain", "n": "two", "half": 0.5}
    c = {"messages": [{**m, "name": "z"} for m in _messages("c")], "n": None}
    for name, row in (("a", a), ("b", b), ("c", c)):
        _jsonl(tmp_path / f"{name}.jsonl", [row])
    catalogue = _catalogue(*(tmp_path / f"{name}.jsonl" for name in "abc"))
    selection = _selection([2, 1, 0], [1, 1, 1], 3)
    outputs.write_selection(str(tmp_path / "run"), catalogue, selection, np.ones(3))
    found = _read(tmp_path / "run" / "selection").to_pylist()
    assert [row["n"] and json.loads(row["n"]) for row in found] == [None, "two", 1]
    assert [row["half"] for row in found] == [None, 0.5, 1.0], "integers and floats do not clash"
    assert [row["messages"][0]["content"] for row in found] == ["ask c", "ask b", "ask a"], (
        "a further key in one file's messages made text of all messages"
    )
    assert found[0]["messages"][1]["name"] == "z"


def test_an_earlier_selection_can_be_the_pool(tmp_path, pool):
    _, catalogue = pool
    first = _selection([5, 3, 1], [3, 2, 1], 6)
    outputs.write_selection(str(tmp_path / "one"), catalogue, first, np.array([5.0, 3, 1]))
    again = _catalogue(tmp_path / "one" / "selection.jsonl")
    second = _selection([2, 0], [2, 1], 3)
    table = outputs.write_selection(str(tmp_path / "two"), again, second, np.array([9.0, 7.0]))
    assert [table.column_names.count(name) for name in ADDED] == [1, 1, 1]
    assert table.column("influence_rank").to_pylist() == [1, 2]
    assert table.column("influence_score").to_pylist() == [9.0, 7.0], "the earlier scores stayed"
    assert table.column("id").to_pylist() == ["b", "f"]


def test_parts_of_an_earlier_larger_result_are_removed(tmp_path, pool, monkeypatch):
    _, catalogue = pool
    monkeypatch.setattr(outputs, "ROWS_PER_PART", 2)
    run, folder = str(tmp_path / "run"), tmp_path / "run" / "selection"
    scores = np.array([5.0, 4, 3, 2, 1])
    outputs.write_selection(run, catalogue, _selection([5, 4, 3, 2, 1], [1.2] * 5, 6), scores)
    assert len(list(folder.iterdir())) == 3
    assert _read(folder).column("influence_rank").to_pylist() == [1, 2, 3, 4, 5]
    (folder / "notes.txt").write_text("the user's own")
    outputs.write_selection(run, catalogue, _selection([0, 1], [3, 3], 6), scores[:2])
    assert _read(folder).column("influence_rank").to_pylist() == [1, 2], "rows of both results"
    assert (folder / "notes.txt").exists(), "a file that is no part was deleted"


def _columns(n: int, names: list[str]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "score": rng.normal(size=n),
        "weight": rng.uniform(size=n),
        "exact": rng.random(n) < 0.5,
        "target": [f"t:{i}" for i in range(n)],
    }
    for name in names:
        for kind in ("score", "low", "high"):
            columns[f"{kind}.{name}"] = rng.normal(size=n)
    return columns


def test_every_candidate_has_a_line_and_the_unscored_have_nulls(tmp_path, pool, monkeypatch):
    _, catalogue = pool
    names = ["gsm8k", "bbh/a b"]
    columns = _columns(6, names)
    catalogue.exclude([2], "no assistant turn")
    floats = ["score", *(f"{k}.{n}" for n in names for k in ("score", "low", "high"))]
    for name in floats:
        columns[name][2] = np.nan
    columns["target"][2] = None
    columns["weight"][2] = 0.0
    monkeypatch.setattr(outputs, "ROWS_PER_PART", 4)
    P = np.random.default_rng(1).normal(size=(6, 2))
    P[2] = np.nan
    table = _SparseTable(P, step=3)
    assert outputs.write_scores(str(tmp_path), catalogue, names, table, _of(columns, P)) == 2
    table = _read(tmp_path / "scores")
    assert table.num_rows == 6
    for i, row in enumerate(table.to_pylist()):
        assert row["id"] == catalogue.ids[i]
        assert row["n_tokens"] == catalogue.n_tokens[i]
        assert row["n_response_tokens"] == catalogue.n_response_tokens[i]
        assert row["reason"] == catalogue.reason[i]
        assert (row["weight"], row["exact"]) == (columns["weight"][i], columns["exact"][i])
        assert row["target"] == columns["target"][i]
        for name in floats:
            expected = None if i == 2 else columns[name][i]
            assert row[name] == expected, f"{name}: a missing score must be null, not NaN"
    small = ArrayTable(P[:3])
    outputs.write_scores(str(tmp_path), _head(catalogue, 3), [], small, _of(_columns(3, []), P))
    assert _read(tmp_path / "scores").num_rows == 3, "a part of the larger result stayed"


class _SparseTable(ArrayTable):
    """Blocks hold only rows with scores, as those of shards do."""

    def blocks(self):
        for block in super().blocks():
            yield ScoreBlock(*(part[np.isfinite(block.P[:, 0])] for part in block))


def _of(columns: dict[str, Any], P: np.ndarray) -> Callable[[np.ndarray, np.ndarray], Any]:
    """The columns of some rows, which must come with the scores of the same rows."""

    def rows(positions: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        np.testing.assert_array_equal(scores, P[positions], "scores of other rows")
        return {
            name: [values[i] for i in positions] if isinstance(values, list) else values[positions]
            for name, values in columns.items()
        }

    return rows


def _head(catalogue: Catalogue, n: int) -> Catalogue:
    return one_catalogue((catalogue.files[0], {})) if n == 3 else catalogue


def test_samples_are_the_best_and_the_worst_with_their_text_cut(tmp_path):
    n = 25
    long = "x" * (outputs.SAMPLE_CHARACTERS + 7)
    rows = [{"messages": _messages(long if i == 3 else f"text {i}")} for i in range(n)]
    _jsonl(tmp_path / "pool.jsonl", rows)
    catalogue = _catalogue(tmp_path / "pool.jsonl")
    columns = _columns(n, [])
    columns["score"][3] = 50.0
    columns["score"][7] = np.nan
    score = columns["score"]
    single = TargetColumns((Column("t", "t", (0,)),), ("t",))
    table = ArrayTable(score[:, None], step=4)
    chosen = dict(zip(("best", "worst"), extremes(table, single, "mean", 10), strict=True))
    of_chosen = {
        kind: _of(columns, score[:, None])(rows, score[rows, None]) for kind, rows in chosen.items()
    }
    outputs.write_samples(str(tmp_path), catalogue, chosen, of_chosen)
    found = json.loads(storage.read_bytes(str(tmp_path / "samples.json")))
    scored = [i for i in range(n) if i != 7]
    best = sorted(scored, key=lambda i: -score[i])[: outputs.SAMPLE_ROWS]
    worst = sorted(scored, key=lambda i: score[i])[: outputs.SAMPLE_ROWS]
    for kind, expected in (("best", best), ("worst", worst)):
        assert [sample["id"] for sample in found[kind]] == [f"pool.jsonl:{i}" for i in expected]
        for sample, i in zip(found[kind], expected, strict=True):
            assert sample["score"] == columns["score"][i]
            assert sample["weight"] == columns["weight"][i]
            assert sample["target"] == columns["target"][i]
            if i != 3:
                assert sample["messages"] == rows[i]["messages"], "the text of another row"
    answer = found["best"][0]["messages"][1]["content"]
    assert answer == "x" * outputs.SAMPLE_CHARACTERS + " […]", "not cut, or cut without a sign"


def test_landmarks_have_their_exact_and_predicted_scores_by_name(tmp_path):
    exact, loo = np.arange(6.0).reshape(3, 2), -np.arange(6.0).reshape(3, 2)
    outputs.write_landmarks(str(tmp_path), ["a", "b", "c"], ["t", "t/g"], exact, loo)
    table = pq.read_table(tmp_path / "landmarks.parquet")
    assert table.to_pydict() == {
        "id": ["a", "b", "c"],
        "exact.t": [0, 2, 4],
        "loo.t": [0, -2, -4],
        "exact.t/g": [1, 3, 5],
        "loo.t/g": [-1, -3, -5],
    }
