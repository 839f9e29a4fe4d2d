"""The whole job in one process: every method, combination and quota, against slow oracles."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import (
    N_SCORED,
    POOL_ROWS,
    UNSCORABLE,
    Runner,
    Setup,
    manifest_of,
    messages_of,
    score_column,
    scores_of,
    selection_of,
    tiny_config,
)

from influence.errors import InputError
from influence.one_process import run_select

METHODS: dict[str, dict[str, Any]] = {
    "landmarks, kronecker": {},
    "landmarks, exact products": {"gradients__projection": "exact"},
    "exact, kronecker": {"method": "exact"},
    "exact, exact products": {"method": "exact", "gradients__projection": "exact"},
    "landmarks, whole gradients": {"gradients__projection": "none"},
    "exact, every parameter": {"method": "exact", "gradients__parameters": "all"},
    "exact, srht": {"method": "exact", "gradients__projection": "srht"},
    "exact, countsketch": {"method": "exact", "gradients__projection": "countsketch"},
    "exact, rademacher": {"method": "exact", "gradients__projection": "rademacher"},
    "exact, layerwise": {
        "method": "exact",
        "gradients__projection": "layerwise",
        "gradients__layer_dim": 64,
    },
    "rds": {"method": "rds"},
    "random": {"method": "random"},
}


def grouped(setup: Setup) -> dict[str, Any]:
    """The targets with `sums` as one column, so that every column of P is in the scores."""
    return {"sums": {**setup.targets["sums"], "per": "group"}, "mixed": setup.targets["mixed"]}


@pytest.mark.parametrize("name", METHODS)
def test_outputs_are_complete_and_agree_with_each_other(run: Runner, name: str) -> None:
    directory = run(**METHODS[name])
    table = scores_of(directory)
    rows = table.to_pylist()
    selected = selection_of(directory)
    assert len(rows) == POOL_ROWS, "a row of the pool has no row in the scores"
    reasons = Counter(row["reason"] for row in rows if row["reason"] is not None)
    assert reasons == UNSCORABLE, "rows that cannot be scored are miscounted or dropped"
    for row in rows:
        scored = row["reason"] is None
        values = [row[c] for c in table.column_names if c.split(".")[0] in ("score", "low", "high")]
        assert all((value is not None) == scored for value in values), f"nulls of row {row['id']}"
        assert (row["target"] is not None) == scored
        assert row["weight"] >= 0
        assert scored or row["weight"] == 0, "an unscorable row has a weight"
    total = sum(row["weight"] for row in rows)
    np.testing.assert_allclose(total, N_SCORED, rtol=1e-12, err_msg="weights do not sum to n")
    weighted = {row["id"]: row for row in rows if row["weight"] > 0}
    assert len(selected) == 10, "the selection is not as large as the budget"
    assert [row["influence_rank"] for row in selected] == list(range(1, 11))
    mean = np.mean([row["influence_weight"] for row in selected])
    np.testing.assert_allclose(mean, 1.0, rtol=1e-12, err_msg="the trainer's weights have mean 1")
    for row in selected:
        if row["id"] is not None:  # a JSONL row without an id keeps its input columns as they are
            assert row["influence_score"] == weighted[row["id"]]["score"]
    assert len(weighted) == 10, "a selected row has weight 0, or another has a weight"
    assert len(pq.read_table(f"{directory}/selection")) == 10
    manifest = manifest_of(directory)
    assert manifest.state == "done"
    for stage, record in manifest.stages.items():
        assert record.computed + record.reused == record.shards, f"{stage} lost count of its shards"


def test_layers_kept_whole_are_exact_and_projected_ones_say_how_far_off(run: Runner) -> None:
    whole = run(method="exact", gradients__projection="none")
    kept = run(method="exact", gradients__projection="layerwise", gradients__layer_dim=4096)
    some = run(method="exact", gradients__projection="layerwise", gradients__layer_dim=64)
    truth = score_column(whole, "score.sums")
    np.testing.assert_allclose(score_column(kept, "score.sums"), truth, rtol=1e-4, atol=1e-6)
    noise = {}
    for name, directory in (("kept", kept), ("some", some)):
        fidelity = json.loads(Path(directory, "fidelity.json").read_text())
        noise[name] = fidelity["targets"]["sums"]["sketch_sd"]
    assert noise["kept"] < 1e-9, "layers that are whole were counted as halves of a sketch"
    there = ~np.isnan(truth)
    error = np.sqrt(np.mean((score_column(some, "score.sums") - truth)[there] ** 2))
    assert error / 3 < noise["some"] < 3 * error, "halves of a layer are mixed up"


def test_a_duplicate_is_never_selected_twice(run: Runner) -> None:
    directory = run(method="exact", selection__budget=1000)
    rows = selection_of(directory)
    # The pool's duplicates come after the rows they repeat, so the form of those is what is left.
    texts = [tuple((m["role"], m["content"]) for m in messages_of(row)) for row in rows]
    assert len(texts) == N_SCORED, "a budget larger than the pool takes every scored row once"
    assert len(set(texts)) == len(texts), "two rows with the same messages were selected"


def test_unknown_intervals_are_null_and_no_points(run: Runner) -> None:
    """Eight residuals say nothing of a 90 % interval."""
    directory = run(landmarks__count=8)
    fidelity = json.loads(Path(directory, "fidelity.json").read_text())
    assert fidelity["targets"]["sums"]["score_halfwidth"] is None
    rows = scores_of(directory).to_pylist()
    predicted = [row for row in rows if row["reason"] is None and not row["exact"]]
    assert len(predicted) == N_SCORED - 8
    for row in predicted:
        assert row["low.sums"] is row["high.sums"] is None, "an unknown interval of zero width"
        assert row["score.sums"] is not None
    assert all(row["low.sums"] is not None for row in rows if row["exact"])


def test_the_certificate_says_how_landmarks_were_drawn(run: Runner) -> None:
    for choice in ("uniform", "stratified"):
        directory = run(landmarks__choose=choice)
        fidelity = json.loads(Path(directory, "fidelity.json").read_text())
        assert fidelity["landmark_choice"].startswith(f"{choice}:")
    assert "landmark_choice" in (
        exact := json.loads(Path(run(method="exact"), "fidelity.json").read_text())
    )
    assert exact["landmark_choice"] is None, "nothing was drawn"


def test_linear_sees_lengths_and_cosine_does_not(run: Runner) -> None:
    linear, cosine = (run(landmarks__kernel=kernel) for kernel in ("linear", "cosine"))
    predicted = ~np.asarray(scores_of(linear).column("exact"))
    one, other = (
        score_column(directory, "score.sums")[predicted] for directory in (linear, cosine)
    )
    scored = ~np.isnan(one)
    gap = np.abs(one - other)[scored].max()
    assert gap > 1e-3 * np.abs(other[scored]).max(), "linear got unit rows: it is cosine"


def test_duplicates_are_not_counted_as_exact_rows(run: Runner) -> None:
    fidelity = json.loads(Path(run(method="exact"), "fidelity.json").read_text())
    for name, target in fidelity["targets"].items():
        assert target["recall"]["exact_gradients"] == N_SCORED, f"{name}: duplicates were counted"


@pytest.mark.parametrize("projection", ["kronecker", "exact"])
def test_landmarks_keep_their_exact_scores(run: Runner, projection: str) -> None:
    approximate = run(gradients__projection=projection)
    truth = run(method="exact", gradients__projection=projection)
    exact = np.asarray(scores_of(approximate).column("exact"))
    assert exact.sum() == 24, "landmarks.count rows are exact, no more and no fewer"
    for name in ("score.sums", "score.mixed", "score.mixed/x", "score.mixed/y"):
        np.testing.assert_allclose(
            score_column(approximate, name)[exact],
            score_column(truth, name)[exact],
            rtol=1e-4,
            atol=1e-6,
            err_msg=f"{name}: a landmark's score is not the one of its own gradient",
        )
    ids = scores_of(approximate).column("id").to_pylist()
    written = pq.read_table(f"{approximate}/landmarks.parquet")
    where = [ids.index(each) for each in written.column("id").to_pylist()]
    np.testing.assert_allclose(
        written.column("exact.sums").to_numpy(),
        score_column(approximate, "score.sums")[where],
        rtol=1e-12,
        err_msg="landmarks.parquet and scores disagree: rows are out of order",
    )


# --- oracles: one row at a time, in float64, no code of the product ---


def best_first(score: np.ndarray, ids: list[str]) -> list[str]:
    scored = [i for i in range(len(ids)) if not np.isnan(score[i])]
    return [ids[i] for i in sorted(scored, key=lambda i: (-score[i], ids[i]))]


def selected_ids(directory: str) -> list[str]:
    """Ids in the order of the ranks, from score rows (JSONL rows carry none of their own)."""
    by_score = {row["score"]: row["id"] for row in scores_of(directory).to_pylist()}
    return [by_score[row["influence_score"]] for row in selection_of(directory)]


@pytest.mark.parametrize("combine", ["mean", "max", "round_robin"])
def test_combinations_of_targets(run: Runner, setup: Setup, combine: str) -> None:
    exact = {"method": "exact", "gradients__projection": "exact", "targets": grouped(setup)}
    directory = run(**exact, selection__combine=combine)
    ids = scores_of(directory).column("id").to_pylist()
    sums, x, y = (
        score_column(directory, f"score.{name}") for name in ("sums", "mixed/x", "mixed/y")
    )
    if combine == "mean":
        wanted = best_first((sums + (x + y) / 2) / 2, ids)[:10]
    elif combine == "max":
        wanted = best_first(np.max([sums, x, y], axis=0), ids)[:10]
    else:
        heads = [best_first(sums, ids), best_first(x, ids), best_first(y, ids)]
        wanted = []
        for turn in range(10):  # sums, mixed/x, sums, mixed/y, sums, ...
            head = heads[0] if turn % 2 == 0 else heads[1 + turn // 2 % 2]
            wanted.append(next(each for each in head if each not in wanted))
    assert selected_ids(directory) == wanted, f"{combine} did not take the rows a loop takes"


def test_quotas_bind_and_leave_the_best_of_each_source(run: Runner, setup: Setup) -> None:
    exact = {"method": "exact", "gradients__projection": "exact", "targets": grouped(setup)}
    quotas = {"maths": {"max": 0.2}, "code": {"min": 0.5}}
    directory = run(**exact, selection__combine="mean", selection__per_source=quotas)
    counts = Counter(row["source"] for row in selection_of(directory))
    assert sum(counts.values()) == 10
    assert counts["maths"] <= 2
    assert counts["code"] >= 5
    table = scores_of(directory)
    chosen = set(selected_ids(directory))
    for source, count in counts.items():
        own = [row for row in table.to_pylist() if row["source"] == source and row["score"]]
        own.sort(key=lambda row: -row["score"])
        assert {row["id"] for row in own[:count]} <= chosen, f"not the best rows of {source}"


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_empty_pool_is_refused_by_name(setup: Setup, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "empty.jsonl", [])
    config = tiny_config(setup, tmp_path / "run", data__candidates=[path])
    with pytest.raises(InputError, match=r"empty\.jsonl") as caught:
        run_select(config, quiet=True)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("method", ["influence_distillation", "exact", "rds", "random"])
def test_a_pool_without_a_scorable_row_says_why(setup: Setup, tmp_path: Path, method: str) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "x"}, {"prompt": "a", "completion": ""}])
    config = tiny_config(setup, tmp_path / "run", data__candidates=[path], method=method)
    with pytest.raises(
        InputError, match=r"none of the 2 rows of .*bad.jsonl can be used .*no recognised"
    ):
        run_select(config, quiet=True)
    assert manifest_of(config.run).state == "failed", "the manifest still says that it runs"
