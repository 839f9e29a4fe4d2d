"""Method in2core: scores against the formula in loops, and the same bits however it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datainf_oracle import influences_by_loops
from in2core_runs import gradients_of, run_cut
from tiny_run import (
    N_SCORED,
    Runner,
    Setup,
    assert_same_results,
    manifest_of,
    score_column,
    scores_of,
    selection_of,
    shards_in,
    tiny_config,
)

from influence import storage
from influence.cli import print_summary
from influence.config import Config
from influence.curvature_units import STAGE
from influence.errors import InputError
from influence.local import local_execute
from influence.one_process import run_select
from influence.pipeline import prepare, select
from influence.plan import make_plan
from influence.progress import Progress
from influence.reducer import Reducer
from influence.report import build_report
from influence.sketch_noise import rank_correlation

FILES = ("a.parquet", "b.jsonl")


def expected_scores(config: Config, *, unit: bool = False) -> np.ndarray:
    """The scores of the target `sums` by the formula in loops, over the rows that count."""
    job = prepare(config, Progress(quiet=True))
    manifest = manifest_of(config.run)
    reasons = scores_of(config.run).column("reason").to_pylist()
    rows, where = [], 0
    for file in job.files:
        own = gradients_of(config.cache_url, manifest, file.content_hash, unit=unit)
        rows += [own[row] for row in range(file.rows) if reasons[where + row] is None]
        blocks = own[-1][0]
        where += file.rows
    target = gradients_of(
        config.cache_url, manifest, job.target_files["sums"][0].content_hash, unit=unit
    )
    V = np.stack([vector for row, (vector, _) in target.items() if row >= 0])
    G, norms = (np.stack([row[i] for row in rows]) for i in (0, 1))
    assert len(G) == N_SCORED
    return -influences_by_loops(G, V, blocks, norms).mean(axis=1)


def config_of(setup: Setup, directory: str) -> Config:
    """The config of a run of the fixture."""
    import yaml

    from influence.config_loading import parse_config

    return parse_config(yaml.safe_load(Path(directory, "config.yaml").read_text()))


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {"gradients__projection": "none"},
    "layerwise": {"gradients__layer_dim": 16},
    "unit rows": {"gradients__projection": "none", "gradients__normalize": True},
    "some layers": {"gradients__projection": "none", "layers": ["*.layers.1.*", "*q_proj*"]},
    "sums over tokens": {"gradients__layer_dim": 16, "gradients__reduction": "sum"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_are_the_negated_influences(in2core: Runner, setup: Setup, name: str) -> None:
    directory = in2core(**VARIANTS[name])
    expected = expected_scores(config_of(setup, directory), unit=name == "unit rows")
    found = score_column(directory, "score.sums")
    there = ~np.isnan(found)
    assert there.sum() == N_SCORED, "rows without a score, or duplicates with one of their own"
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[there], expected, rtol=1e-4, atol=2e-5 * scale)
    assert (found[there] > 0).any()
    assert (found[there] < 0).any(), "no opponents among random rows: the sign says nothing"


def test_a_projection_of_every_layer_keeps_the_ranking(in2core: Runner) -> None:
    whole = in2core(gradients__projection="none")
    kept = in2core(gradients__layer_dim=4096)
    some = in2core(gradients__layer_dim=64)
    truth = score_column(whole, "score.sums")
    there = ~np.isnan(truth)
    scale = np.abs(truth[there]).max()
    np.testing.assert_allclose(
        score_column(kept, "score.sums")[there], truth[there], atol=1e-5 * scale, rtol=1e-4
    )
    found = score_column(some, "score.sums")
    assert rank_correlation(found[there], truth[there]) > 0.9
    fidelity = {
        name: json.loads(Path(directory, "fidelity.json").read_text())["targets"]["sums"]
        for name, directory in (("whole", whole), ("some", some))
    }
    assert fidelity["whole"]["sketch_sd"] is None, "whole gradients have no noise to report"
    error = float(np.sqrt(np.mean((found - truth)[there] ** 2)))
    assert error / 4 < fidelity["some"]["sketch_sd"] < 4 * error


def test_outputs_and_leftovers(in2core: Runner) -> None:
    directory = in2core(gradients__projection="none")
    rows = selection_of(directory)
    assert {row["influence_weight"] for row in rows} == {1.0}, "In2Core keeps rows, it weighs none"
    assert not storage.list_objects(storage.join(directory, "scoring")), "partial sums are left"
    stages = manifest_of(directory).stages
    assert {"gradients", STAGE, "scores"} <= stages.keys()
    assert stages["gradients"].planned


def test_only_proponents_are_selected_and_the_rest_is_said(
    in2core: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"gradients__projection": "none", "selection__combine": "mean"}
    directory = in2core(**changes, selection__budget=1000)
    score = score_column(directory, "score")
    helpful, harmful = int((score > 0).sum()), int((score < 0).sum())
    assert 0 < helpful < N_SCORED
    counts = manifest_of(directory).counts
    assert (counts["proponents"], counts["opponents"]) == (helpful, harmful)
    assert counts["selected"] == helpful, "a budget above the proponents took others"
    assert counts["short_of_proponents"]
    assert all(row["influence_score"] > 0 for row in selection_of(directory))
    print_summary(directory, {**summary_of(directory), "report": "report.html"})
    printed = capsys.readouterr().out
    assert f"proponents (score above 0): {helpful} of {N_SCORED}" in printed
    assert "all of them are selected, and no other row" in printed
    half = in2core(**changes, selection__budget="50% of proponents")
    assert len(selection_of(half)) == round(helpful / 2)
    best = np.sort(score[score > 0])[::-1][: round(helpful / 2)]
    np.testing.assert_array_equal([row["influence_score"] for row in selection_of(half)], best)
    assert not manifest_of(half).counts["short_of_proponents"]


def test_the_report_lists_opponents_as_likely_harmful_rows(in2core: Runner) -> None:
    directory = in2core(
        gradients__projection="none", selection__budget=1000, selection__combine="mean"
    )
    page = Path(directory, "report.html").read_text()
    samples = json.loads(Path(directory, "samples.json").read_text())
    assert "Opponents: likely harmful rows" in page
    assert "is larger than the proponents" in page
    section = page[page.index("Opponents: likely harmful") : page.index('id="weights"')]
    listed = [row["id"] for row in samples["worst"] if row["score"] < 0]
    assert listed
    assert section.count("<details") == len(listed), "rows that do no harm are listed as harmful"
    assert all(f">{name}<" in section for name in listed)


def summary_of(directory: str) -> dict[str, Any]:
    """As much of a run's summary as is printed."""
    fidelity = json.loads(Path(directory, "fidelity.json").read_text())
    return {"sources": {"x": (1, 1)}, "fidelity": fidelity, "counts": manifest_of(directory).counts}


def test_a_plan_counts_the_runs_shards(in2core: Runner, setup: Setup) -> None:
    directory = in2core(gradients__layer_dim=16)
    config = config_of(setup, directory)
    fresh = config.model_copy(update={"run": f"{directory}-plan", "cache": f"{directory}-plan/c"})
    planned = make_plan(fresh).work.stages
    record = manifest_of(directory).stages["gradients"]
    assert planned["gradients"].shards == record.shards
    cached = make_plan(config).work.stages
    assert cached["gradients"].cached == record.shards, "plan and run name their shards differently"


@pytest.mark.parametrize(("stage", "after"), [("gradients", 5), (STAGE, 4), ("scores", 2)])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(
    setup: Setup, tmp_path: Path, in2core: Runner, adapter: str, stage: str, after: int
) -> None:
    whole = in2core(gradients__layer_dim=16)
    config = tiny_config(
        setup,
        tmp_path / "run",
        method="in2core",
        model__adapter=adapter,
        reference__adapter=adapter,
        gradients__layer_dim=16,
    )
    run_cut(config, after, stage)
    left = shards_in(Path(config.run, "scoring"))
    assert sum(key.startswith(stage) for key in left) == (0 if stage == "gradients" else after)
    times = {key: Path(config.run, "scoring", key).stat().st_mtime_ns for key in left}
    run_cut(config, 1, "scores" if stage == "gradients" else stage)  # and once more
    for key, time in times.items():
        assert Path(config.run, "scoring", key).stat().st_mtime_ns == time, "it was made again"
    job = prepare(config, Progress(quiet=True))
    select(job, local_execute(config, job.watch), Reducer(config))
    build_report(config.run)
    assert_same_results(whole, config.run, "partial sums of an earlier attempt changed the result")


def test_the_size_of_groups_and_the_order_of_work_do_not_show(
    setup: Setup, tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units in any order; other groups move the last bits of sums alone."""
    results = {}
    for name in ("forwards", "backwards", "few groups"):
        config = tiny_config(
            setup,
            tmp_path / name,
            cache=str(tmp_path / "cache"),
            method="in2core",
            model__adapter=adapter,
            gradients__layer_dim=16,
        )
        if name == "few groups":
            monkeypatch.setattr("influence.curvature_units.MOST_GROUPS", 2)
        job = prepare(config, Progress(quiet=True))
        plain = local_execute(config, job.watch)

        def execute(bundles: Any, on_result: Any, on_failure: Any, plain=plain, name=name) -> None:
            plain(list(bundles)[::-1] if name == "backwards" else bundles, on_result, on_failure)

        select(job, execute, Reducer(config))
        results[name] = config.run
    assert_same_results(results["forwards"], results["backwards"], "the order of work shows")
    one, two = (score_column(results[n], "score.sums") for n in ("forwards", "few groups"))
    np.testing.assert_allclose(one, two, rtol=1e-5, equal_nan=True)


def test_what_does_not_fit_is_refused_before_a_model_runs(setup: Setup, tmp_path: Path) -> None:
    missing = tiny_config(setup, tmp_path / "none", method="in2core")
    with pytest.raises(InputError, match=r"reference\.adapter"):
        run_select(missing, quiet=True)
    assert not Path(missing.run).exists()


def test_more_target_columns_than_fit_are_refused_with_the_bytes(
    setup: Setup, tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence.in2core.SHARD_BYTES", 1000)
    config = tiny_config(setup, tmp_path / "run", method="in2core", model__adapter=adapter)
    with pytest.raises(InputError, match=r"7 target columns x [\d,]+ numbers x 8 bytes"):
        run_select(config, quiet=True)
    assert "gradients" not in manifest_of(config.run).stages


def test_layers_that_fit_none_are_named(setup: Setup, tmp_path: Path, adapter: str) -> None:
    config = tiny_config(
        setup, tmp_path / "run", method="in2core", model__adapter=adapter, layers=["*.layers.9.*"]
    )
    with pytest.raises(InputError, match=r"layers: '\*\.layers\.9\.\*' fits no attributed"):
        run_select(config, quiet=True)
