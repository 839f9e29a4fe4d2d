"""`influence evaluate` on fidelity: the grid against scipy and loops on the cache's own numbers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fixture import spearman as spearman_of
from tiny_run import (
    N_SCORED,
    Runner,
    Setup,
    manifest_of,
    score_column,
    shards_in,
    tiny_config,
    write_config,
)

from influence import landmarks
from influence.cache_use import use_of
from influence.config import Config
from influence.embedding_kind import EmbeddingKind, embedding_fingerprint
from influence.evaluation_tables import result_figures, result_tables
from influence.evaluations.fidelity_reduce import OVERALL
from influence.fidelity import certify
from influence.fidelity_grid import Setting, rank_correlations, recalls, settings_of, try_setting
from influence.one_process import run_evaluate, run_select
from influence.pipeline import catalogue_units, embedding_units, prepare
from influence.progress import Progress
from influence.reducer import Reducer
from influence.report import build_report
from influence.shard_reader import read_embeddings

DRAWS = 2
FIDELITY: dict[str, Any] = {
    "pilot": None,
    "landmarks": [12, 24, 512],
    "repeats": DRAWS,
    "embeddings": [{"kind": "hidden", "blocks": 1}, {"kind": "rds"}],
    "kernels": ["rbf", "linear"],
    "damping": [0.1],
    "recalls": [0.6],
}


@pytest.fixture(scope="module")
def evaluated(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run by exact scores, and the grid on the same cache."""
    folder = tmp_path_factory.mktemp("fidelity")
    changes = {"cache": str(folder / "cache"), "evaluation": {"fidelity": FIDELITY}}
    config = tiny_config(setup, folder / "run", method="exact", **changes)
    run_select(config, quiet=True)
    run_evaluate(config, quiet=True)
    return config


def result_of(config: Config) -> dict[str, Any]:
    return json.loads(Path(config.run, "evaluation.json").read_text())["fidelity"]


def embeddings_of(config: Config, kind: EmbeddingKind) -> tuple[np.ndarray, list[bytes]]:
    """Unit rows of the candidates that have exact scores, by one embedding, and their digests."""
    job = prepare(config, Progress(quiet=True))
    reducer = Reducer(config)
    reducer.load_catalogue(*catalogue_units(job))
    assert reducer.pool is not None
    found = embedding_fingerprint(job.fingerprints["embedding"], config, kind)
    job.fingerprints["embedding"] = found
    rows = reducer.pool.eligible
    X = read_embeddings(reducer.cache, embedding_units(job), reducer.pool, rows)
    return X.astype(np.float64), [reducer.pool.digests[row] for row in rows]


def truth_of(config: Config) -> dict[str, np.ndarray]:
    """The exact scores of the run's own target names, and the mean of the targets."""
    names = ("sums", "mixed", "mixed/x", "mixed/y")
    scores = {name: score_column(config.run, f"score.{name}") for name in names}
    there = ~np.isnan(scores["sums"])
    kept = {name: values[there].astype(np.float64) for name, values in scores.items()}
    return {**kept, OVERALL: (kept["sums"] + kept["mixed"]) / 2}


def test_a_setting_is_the_regression_on_its_own_rows(evaluated: Config) -> None:
    found, truth = result_of(evaluated), truth_of(evaluated)
    (shown,) = [
        each
        for each in found["settings"]
        if (each["embedding"], each["landmarks"]) == ("hidden, 1 block", 12)
    ]
    assert (shown["kernel"], shown["damping"]) == ("laplace", 0.01), "two things changed at once"
    X, digests = embeddings_of(evaluated, EmbeddingKind("hidden", 1, 2, "rank1", 4096))
    top = max(1, round(10 / N_SCORED * N_SCORED))
    for name, y in truth.items():
        spearman, recall, claims = [], [], []
        for draw in range(DRAWS):
            keys = landmarks.row_keys(0, digests, purpose=f"grid {draw}".encode())
            chosen = np.argsort(keys, kind="stable")[:12]
            model = landmarks.fit(X[chosen], y[chosen, None], kernel="laplace", damping=0.01)
            predicted = landmarks.predict(model, X)[:, 0]
            rest = [row for row in range(len(y)) if row not in set(chosen.tolist())]
            spearman.append(spearman_of(predicted[rest], y[rest]))
            predicted[chosen] = y[chosen]
            best = [set(np.argsort(-v, kind="stable")[:top].tolist()) for v in (predicted, y)]
            recall.append(len(best[0] & best[1]) / top)
            order = np.sort(chosen)
            model = landmarks.fit(X[order], y[order, None], kernel="laplace", damping=0.01)
            claims += certify(
                y[order, None], model.loo_predictions, n=len(y), share=10 / N_SCORED, seed=0
            )
        figures = shown["names"][name]
        assert figures["spearman"]["mean"] == pytest.approx(np.mean(spearman), abs=1e-6), name
        assert figures["spearman"]["most"] == pytest.approx(max(spearman), abs=1e-6), name
        assert figures["recall"]["mean"] == pytest.approx(np.mean(recall)), name
        for key, of, value in (("spearman", spearman, "value"), ("recall", recall, "expected")):
            stated = [getattr(claim, key) for claim in claims]
            inside = [c.low <= t <= c.high for c, t in zip(stated, of, strict=True)]
            mean = np.mean([getattr(c, value) for c in stated])
            assert figures[f"stated_{key}"]["value"] == pytest.approx(mean, abs=1e-6), name
            assert figures[f"stated_{key}"]["inside"] == np.mean(inside), name


def test_the_grid_is_a_star_around_the_configs_own_setting(evaluated: Config) -> None:
    found = result_of(evaluated)
    own = found["settings"][0]
    keys = ("embedding", "landmarks", "kernel", "damping")
    assert [own[key] for key in keys] == ["jvp, 2 blocks, 2 rank1 tangents", 12, "laplace", 0.01]
    for each in found["settings"][1:]:
        assert sum(each[key] != own[key] for key in keys) == 1, "no star"
    assert len(found["settings"]) == 1 + 1 + 2 + 2 + 1
    assert found["about"]["left_out"] == [512], "a number of landmarks that does not fit is silent"
    cost = {each["label"]: each for each in found["embeddings"]}
    assert cost["hidden, 1 block"]["flops"] < cost[own["embedding"]]["flops"]
    assert all(each["seconds"] > 0 for each in found["embeddings"]), "nothing was timed"
    by_landmarks = [each for each in found["settings"] if each["landmarks"] == 24]
    extra = found["about"]["gradient_flops"] * 12 / N_SCORED
    assert by_landmarks[0]["flops"] - own["flops"] == pytest.approx(extra)


def test_certified_rounds_say_what_they_found_and_took(evaluated: Config) -> None:
    found = result_of(evaluated)
    asked = [(each["embedding"], each["asked"], each["draws"]) for each in found["certified"]]
    own = "jvp, 2 blocks, 2 rank1 tangents"
    assert asked == [
        (own, 0.6, DRAWS),
        (own, 0.95, DRAWS),
        ("hidden, 1 block", 0.95, 1),
        ("rds", 0.95, 1),
    ]
    for each in found["certified"]:
        assert 0 < each["exact"]["mean"] <= N_SCORED
        assert each["exact_share"] == pytest.approx(each["exact"]["mean"] / N_SCORED)
        if each["exact"]["least"] == N_SCORED:
            assert each["recall"]["least"] == 1.0, "all scores are exact, and rows are missing"


def test_gradients_are_the_runs_own_and_a_second_time_nothing_is_computed(
    evaluated: Config,
) -> None:
    own = manifest_of(f"{evaluated.run}/evaluations/fidelity")
    assert own.stages["gradients"].computed == 0, "the gradients of the exact run are there"
    before, shards = result_of(evaluated), shards_in(evaluated.cache_url)
    run_evaluate(evaluated, quiet=True)
    again = result_of(evaluated)
    assert shards_in(evaluated.cache_url) == shards
    assert [each["seconds"] for each in again["embeddings"]] == [None] * 3, "cached, yet timed"
    for key in ("settings", "certified"):
        assert again[key] == before[key], "the same config gives other figures"


def test_a_prune_keeps_every_embedding_that_was_compared(evaluated: Config, tmp_path: Path) -> None:
    use = use_of(write_config(tmp_path / "config.yaml", evaluated), evaluated.cache_url)
    made = {tuple(key.split("/")[:2]) for key in shards_in(evaluated.cache_url)}
    assert made <= set(use.places), "a prune would remove what the grid reads"


def test_report_and_terminal_show_it(evaluated: Config) -> None:
    found = result_of(evaluated)
    (table,) = result_tables(evaluated.run, {"fidelity": found})
    assert len(table.rows) == len(found["settings"]) + 4 + len(found["certified"])
    assert {len(row) for row in table.rows} == {len(table.headings)}
    ((_table, figures),) = result_figures(evaluated.run, {"fidelity": found})
    assert len(figures) == 3
    page = Path(build_report(evaluated.run)).read_text()
    assert "Fidelity of predicted scores" in page
    assert "certified for 0.95: hidden, 1 block" in page


def test_a_pilot_takes_only_its_rows(setup: Setup, run: Runner, tmp_path: Path) -> None:
    """Of a sparse pilot nothing else is embedded; what an earlier run embedded is read."""
    section = {**FIDELITY, "pilot": 30, "embeddings": [{"kind": "rds"}], "recalls": []}
    cache = str(tmp_path / "cache")
    config = tiny_config(setup, tmp_path / "run", cache=cache, evaluation={"fidelity": section})
    run_evaluate(config, quiet=True)
    assert result_of(config)["about"]["pilot"] == 30
    own = manifest_of(f"{config.run}/evaluations/fidelity")
    assert own.stages["embedding"].load.rows == 2 * 30, "rows beside the pilot's were embedded"
    run_select(config, quiet=True)
    Path(config.run, "evaluation.json").unlink()
    for shard in Path(cache).glob("embedding/*/*-*-*-*.parquet"):
        shard.unlink()
    run_evaluate(config, quiet=True)
    own = manifest_of(f"{config.run}/evaluations/fidelity")
    assert own.stages["embedding"].load.rows == 30, "the run's own embeddings are not read"


def test_of_auto_the_chosen_embedding_is_the_configs_own(setup: Setup, tmp_path: Path) -> None:
    section = {**FIDELITY, "pilot": 40, "embeddings": None, "recalls": []}
    choices = [{"kind": "hidden", "blocks": 1}, {"kind": "rds"}]
    embedding = {"kind": "auto", "pilot": 16, "choices": choices}
    config = tiny_config(
        setup, tmp_path / "run", embedding=embedding, evaluation={"fidelity": section}
    )
    run_select(config, quiet=True)
    chosen = manifest_of(config.run).embedding
    assert chosen is not None
    run_evaluate(config, quiet=True)
    found = result_of(config)
    assert found["settings"][0]["embedding"] == chosen.chosen
    assert {each["label"] for each in found["embeddings"]} == {"hidden, 1 block", "rds"}


def test_rank_correlations_and_recalls_are_those_of_loops() -> None:
    rng = np.random.default_rng(0)
    A, B = (rng.integers(0, 6, (40, 5)).astype(float) for _ in range(2))
    A[:, 4] = 1.0
    found = rank_correlations(A, B)
    for column in range(4):
        expected = spearman_of(A[:, column], B[:, column])
        assert found[column] == pytest.approx(expected), "ties are not at their mean rank"
    assert np.isnan(found[4])
    for top in (1, 7, 40):
        for column, value in enumerate(recalls(A, B, np.ones(40), top / 40)):
            heads = [
                set(sorted(range(40), key=lambda i, s=s: (-s[i, column], i))[:top]) for s in (A, B)
            ]
            assert value == pytest.approx(len(heads[0] & heads[1]) / top)


def test_a_row_that_stands_for_several_counts_as_so_many_rows() -> None:
    rng = np.random.default_rng(1)
    A, B = (rng.normal(size=(40, 3)) for _ in range(2))
    copies = rng.integers(1, 6, 40)
    n = int(copies.sum())
    many = [np.repeat(scores, copies, axis=0) for scores in (A, B)]
    for top in (1, 9, n // 2, n):
        found = recalls(A, B, copies.astype(float), top / n)
        assert found == pytest.approx(recalls(*many, np.ones(n), top / n)), f"top {top}"


def test_a_pilots_recall_is_that_of_so_many_landmarks_in_the_pool() -> None:
    """Half of the pilot are landmarks: among its own rows their exact scores are half the head."""
    rng = np.random.default_rng(2)
    n, pilot, count = 20_000, 1_000, 500
    X = rng.normal(size=(n, 12))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    Y = np.tanh(3 * X @ rng.normal(size=(12, 4))) + rng.normal(size=(n, 4))
    rows, chosen = np.sort(rng.permutation(n)[:pilot]), np.arange(0, pilot, pilot // count)
    trial = partial(
        try_setting, kernel="laplace", damping=0.1, stated=4, share=0.05, seed=0, pool=n
    )
    whole = trial(X, Y, rows[chosen], tops=[n // 20])
    found = trial(X[rows], Y[rows], chosen, tops=[pilot // 20])
    assert found.recall.mean() == pytest.approx(whole.recall.mean(), abs=0.05), (
        "landmarks count as a part of the pilot, and are paid for as a part of the pool"
    )
    alone = trial(X[rows], Y[rows], chosen, tops=[pilot // 20], pool=pilot)
    assert alone.recall.mean() > whole.recall.mean() + 0.2, "the scene is not as it should be"
    for (_, stated), recall in zip(found.stated, whole.recall[0], strict=True):
        assert stated.low <= recall <= stated.high, "stated for the pilot, not for the pool"


def test_a_full_design_has_every_combination_once() -> None:
    own = Setting(0, 10, "rbf", 0.01)
    full = settings_of(own, 2, [10, 20], ["rbf", "linear"], [0.1], full=True)
    assert full[0] == own
    assert len(full) == len(set(full)) == 2 * 2 * 2 * 2
    star = settings_of(own, 2, [10, 20], ["rbf", "linear"], [0.1], full=False)
    assert len(star) == len(set(star)) == 1 + 1 + 1 + 1 + 1
