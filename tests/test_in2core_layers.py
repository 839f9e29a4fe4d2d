"""In2Core's layers by name and by economy, and its ways from token gradients to a row's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in2core_runs import run_cut
from tiny_run import (
    N_SCORED,
    UNSCORABLE,
    Runner,
    Setup,
    assert_same_results,
    manifest_of,
    score_column,
    tiny_config,
    write_config,
)

from influence.cache import Cache
from influence.cache_use import use_of
from influence.errors import InputError
from influence.evaluation_tables import result_tables
from influence.local import local_execute
from influence.one_process import run_evaluate, run_select
from influence.pipeline import prepare, select
from influence.progress import Progress
from influence.reducer import Reducer
from influence.report import build_report
from influence.sketch_noise import rank_correlation
from influence.vector_export import export_vectors

REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"gradients__reduction": "sum"},
    "sqrt": {"gradients__reduction": "sqrt"},
    "unit norm": {"gradients__normalize": True},
    "token_max": {"gradients__reduction": "token_max"},
}


def test_length_bias_of_every_reduction_is_in_its_report(in2core: Runner) -> None:
    found = {}
    for name, changes in REDUCTIONS.items():
        directory = in2core(gradients__projection="none", **changes)
        score, tokens = (score_column(directory, c) for c in ("score.sums", "n_response_tokens"))
        there = ~np.isnan(score)
        found[name] = rank_correlation(score[there], tokens[there])
        biases = manifest_of(directory).counts["length_spearman"]
        assert biases["sums"] == pytest.approx(found[name], abs=1e-12)
        page = Path(directory, "report.html").read_text()
        table = page[page.index('id="length-bias"') :]
        table = table[: table.index("</table>")]
        assert f"{abs(biases['sums']):.2f}" in table
        assert all(f">{each}<" in table for each in biases), "a target's bias is not in the report"
        assert f"<code>{changes.get('gradients__reduction', 'mean')}</code>" in page
    assert len({round(value, 6) for value in found.values()}) == len(found), "one reduction twice"


def test_evaluate_compares_the_reductions_as_runs_of_each_do(
    in2core: Runner, setup: Setup, tmp_path: Path, adapter: str
) -> None:
    """All from the gradients of the mean, but for the strongest token's."""
    runs = {
        name: in2core(gradients__projection="none", **changes)
        for name, changes in REDUCTIONS.items()
    }
    config = tiny_config(
        setup,
        tmp_path / "run",
        cache=f"{runs['mean']}/../cache",
        method="in2core",
        reference__adapter=adapter,
        gradients__projection="none",
        evaluation__reductions={},
    )
    run_evaluate(config, quiet=True)
    found = json.loads(Path(config.run, "evaluation.json").read_text())["reductions"]
    own = manifest_of(f"{config.run}/evaluations/reductions")
    assert own.stages["gradients"].computed == 0, "the gradients of the mean are there"
    mean = score_column(runs["mean"], "score.mixed")
    there = ~np.isnan(mean)
    assert found["about"]["candidates"] == there.sum() == N_SCORED
    for name, directory in runs.items():
        way = found["unit" if name == "unit norm" else name]
        biases = manifest_of(directory).counts["length_spearman"]
        assert way["length_spearman"] == pytest.approx(biases, abs=1e-3), name
        scores = score_column(directory, "score.mixed")
        rho = rank_correlation(scores[there], mean[there])
        assert way["spearman"]["mixed"] == pytest.approx(rho, abs=1e-3), name
        head = [set(np.argsort(-x[there], kind="stable")[:3].tolist()) for x in (scores, mean)]
        assert way["overlap"]["mixed"] == pytest.approx(len(head[0] & head[1]) / 3), name
    (shown,) = result_tables(config.run, {"reductions": found})
    assert len(shown.rows) == len(runs) * len(config.targets)


def test_token_max_takes_each_rows_strongest_token(in2core: Runner, setup: Setup) -> None:
    mean, most = (
        in2core(gradients__projection="none", targets=one_column(setup), **REDUCTIONS[name])
        for name in ("mean", "token_max")
    )
    assert manifest_of(most).stages["gradients"].computed == 0, "gradients are those of the mean"
    one, other, tokens = (
        score_column(directory, column)
        for directory, column in (
            (mean, "score.sums"),
            (most, "score.sums"),
            (mean, "n_response_tokens"),
        )
    )
    there = ~np.isnan(one)
    np.testing.assert_array_equal(there, ~np.isnan(other))
    scale = np.abs(one[there]).max()
    assert (other[there] > one[there] - 1e-4 * scale).all(), "no token is above the mean of all"
    assert (other[there] - one[there] > 0.1 * scale).mean() > 0.9
    assert tokens[there].min() > 1


def one_column(setup: Setup) -> dict[str, Any]:
    return {"sums": {**setup.targets["sums"], "per": "group"}}


def pool_layers(directory: str, cache: str) -> set[tuple[str, ...]]:
    """The layers of a run's own gradient shards, as sets."""
    record = manifest_of(directory).stages["gradients"]
    shards = [Cache(cache).read(key) for key in record.planned if record.fingerprint in key]
    return {tuple(name for name, _, _ in s.layout.blocks) for s in shards if s.layout.blocks}


def test_layers_are_chosen_on_a_pilot_and_only_they_are_kept(
    setup: Setup, tmp_path: Path, adapter: str
) -> None:
    changes: dict[str, Any] = {
        "cache": str(tmp_path / "cache"),
        "method": "in2core",
        "model__adapter": adapter,
        "gradients__layer_dim": 16,
    }
    auto = tiny_config(
        setup, tmp_path / "auto", layers="auto", layer_economy={"pilot": 40}, **changes
    )
    run_cut(auto, 7, "gradients")  # in the pilot: what follows takes it up
    job = prepare(auto, Progress(quiet=True))
    select(job, local_execute(auto, job.watch), Reducer(auto))
    build_report(auto.run)
    choice = manifest_of(auto.run).layers
    assert choice is not None
    assert (choice.pilot, choice.groups, choice.rows) == (40, 21, 72)
    assert choice.row_bytes <= choice.budget_row_bytes == 0.25 * choice.full_row_bytes
    kept = set(choice.names)
    assert {frozenset(names) for names in pool_layers(auto.run, auto.cache_url)} == {
        frozenset(kept)
    }, "gradients of other layers were kept of the pool"
    page = Path(auto.run, "report.html").read_text()
    assert 'id="layers"' in page
    assert all(module.split(".lora_")[0] in page for module in kept)
    by_name = tiny_config(setup, tmp_path / "named", layers=choice.names, **changes)
    run_select(by_name, quiet=True)
    assert manifest_of(by_name.run).stages["gradients"].computed == 0, "shards are not shared"
    assert_same_results(auto.run, by_name.run, "layers by name are others than those chosen")
    done = export_vectors(auto, "gradients", str(tmp_path / "out"), command="influence select")
    assert done.rows["candidates"] == N_SCORED + UNSCORABLE["duplicate"]
    places = {key.split("/")[1] for key in manifest_of(auto.run).stages["gradients"].planned}
    path = write_config(tmp_path / "auto.yaml", auto)
    used = {digest for stage, digest in use_of(path, auto.cache_url).places if stage == "gradients"}
    assert places <= used, "a prune that keeps this config would remove its shards"


def test_a_memory_that_holds_no_layer_is_refused_with_the_bytes(
    setup: Setup, tmp_path: Path, adapter: str
) -> None:
    config = tiny_config(
        setup,
        tmp_path / "run",
        method="in2core",
        model__adapter=adapter,
        gradients__layer_dim=16,
        layers="auto",
        layer_economy={"memory": 1000, "pilot": 8},
    )
    with pytest.raises(InputError, match=r"layer_economy\.memory: 1000 is 14 bytes a row"):
        run_select(config, quiet=True)
