"""LESS: whole runs against its formula in loops, over the checkpoints of a real warm-up."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from less_oracle import formula_scores
from test_plan_runs import planned_and_run
from tiny_run import (
    POOL_ROWS,
    Setup,
    assert_same_results,
    manifest_of,
    score_column,
    scores_of,
    selection_of,
    shards_in,
    third_target,
    tiny_config,
    write_config,
)

from influence import stages
from influence.batching import make_batches
from influence.cache_listing import scan_cache
from influence.cache_prune import plan_prune
from influence.cache_use import use_of
from influence.calibration import measure_speeds
from influence.candidates import read_examples, scan_files
from influence.checkpoint_tools import CheckpointTools
from influence.checkpoints import epoch_folder
from influence.config import Config
from influence.config_loading import parse_config
from influence.errors import InputError
from influence.one_process import run_select
from influence.own_training import own_training
from influence.plan import make_plan
from influence.replica import load_replica, load_tokenizer
from influence.schemas import ExportLayout
from influence.stage_settings import stage_settings
from influence.stages import Toolbox
from influence.tokenization import make_encoder
from influence.vector_export import export_vectors
from influence.worker import Worker
from ray_jobs import select as select_job

WARM: dict[str, Any] = {
    "fraction": 0.5,
    "rank": 2,
    "learning_rate": 0.02,
    "batch_size": 8,
    "epochs": 2,
}
SUB_TASKS = ("sums", "mixed/x", "mixed/y")


def less_config(setup: Setup, run: Path, cache: Path, **changes: Any) -> Config:
    given = {"warmup": WARM, "gradients": {"projection": "none"}, **changes}
    return tiny_config(setup, run, method="less", cache=str(cache), **given)


@pytest.fixture(scope="module")
def whole(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with two checkpoints whose vectors are not projected."""
    folder = tmp_path_factory.mktemp("less")
    config = less_config(setup, folder / "run", folder / "cache", model__dtype="float64")
    run_select(config, quiet=True)
    return config


def warmup_of(config: Config) -> str:
    own = own_training(config)
    assert own is not None
    return own.url


def test_scores_are_the_formula_and_the_largest_decides(whole: Config, setup: Setup) -> None:
    ids, wanted = formula_scores(whole, setup)
    table = scores_of(whole.run)
    where = [table.column("id").to_pylist().index(each) for each in ids]
    for name in SUB_TASKS:
        np.testing.assert_allclose(
            score_column(whole.run, f"score.{name}")[where],
            wanted[name],
            rtol=1e-4,
            atol=1e-6,
            err_msg=f"score.{name}: another update, other weights of checkpoints or another mean",
        )
    largest = np.max([wanted[name] for name in SUB_TASKS], axis=0)
    found = score_column(whole.run, "score")[where]
    np.testing.assert_allclose(found, largest, rtol=1e-4, err_msg="not the largest sub-task's")
    scores = score_column(whole.run, "score")
    best = np.sort(scores[~np.isnan(scores)])[::-1][:10]
    chosen = [row["influence_score"] for row in selection_of(whole.run)]
    np.testing.assert_allclose(chosen, best, err_msg="the selection is not the top of the ranking")
    assert {row["influence_weight"] for row in selection_of(whole.run)} == {1.0}


@pytest.fixture(scope="module")
def sketched(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with the method's own projection."""
    folder = tmp_path_factory.mktemp("sketched")
    config = less_config(setup, folder / "run", folder / "cache", gradients={"dim": 64})
    run_select(config, quiet=True)
    return config


def other_run(config: Config, run: Path, **changes: Any) -> Config:
    return config.model_copy(update={"run": str(run), **changes})


STAGES = {"gradients": 2 * 9, "target_gradients": 2 * 2}  # checkpoints x shards of eight rows


def test_a_second_run_computes_nothing_and_a_new_target_its_own(
    sketched: Config, setup: Setup, tmp_path: Path
) -> None:
    first = manifest_of(sketched.run)
    for stage, shards in STAGES.items():
        record = first.stages[stage]
        assert record.computed == record.shards == shards
        assert len({key.split("/")[1] for key in record.planned}) == 2, "checkpoints share shards"
    again = other_run(sketched, tmp_path / "again")
    run_select(again, quiet=True)
    for stage, shards in STAGES.items():
        record = manifest_of(again.run).stages[stage]
        assert (record.computed, record.reused) == (0, shards)
    assert_same_results(sketched.run, again.run, "shards of the cache gave other scores")
    third = parse_config(
        {
            **sketched.model_dump(mode="json"),
            "run": str(tmp_path / "third"),
            "targets": {"third": third_target(tmp_path), "sums": setup.targets["sums"]},
        }
    )
    run_select(third, quiet=True)
    found = manifest_of(third.run).stages
    assert found["gradients"].computed == 0, "a new target made the candidates' updates anew"
    assert (found["target_gradients"].computed, found["target_gradients"].reused) == (2, 2)


def test_a_run_that_was_killed_computes_what_is_missing(
    sketched: Config, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    config = other_run(sketched, tmp_path / "run", cache=str(cache))
    done: list[str] = []
    compute = Worker.run

    def dies(self: Worker, bundle: Any) -> Any:
        if bundle.units[0].checkpoint is not None:
            done.append(bundle.units[0].key)
            if len(done) == 17:  # at the second checkpoint
                raise KeyboardInterrupt
        return compute(self, bundle)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            run_select(config, quiet=True)
    there = {key for key in shards_in(cache) if key.split("/")[0] in STAGES}
    assert there == set(done[:-1])
    assert len({key.split("/")[1] for key in there if key.startswith("gradients")}) == 2
    run_select(config, quiet=True)
    records = manifest_of(config.run).stages
    assert records["warmup"].tokens == 0, "the warm-up was made again"
    assert sum(records[stage].computed for stage in STAGES) == sum(STAGES.values()) - len(there)
    assert_same_results(sketched.run, config.run, "a resumed run has other scores")


def test_the_plan_counts_every_checkpoint(sketched: Config, setup: Setup, tmp_path: Path) -> None:
    fresh = less_config(setup, tmp_path / "run", tmp_path / "cache", gradients={"dim": 64})
    plan = make_plan(fresh)
    assert any("at each of 2 checkpoints" in note for note in plan.notes)
    bill = manifest_of(sketched.run).bill
    assert bill is not None
    for stage in STAGES:
        planned, took = plan.bill.stages[stage].planned, bill.stages[stage].took
        assert took is not None
        for what in ("shards", "rows", "tokens", "flops", "objects"):
            expected = getattr(planned, what)
            assert expected == getattr(took, what), f"{stage}: {what} planned {expected}"
    assert plan.bill.stages["gradients"].planned.rows == 2 * POOL_ROWS
    there = make_plan(other_run(sketched, tmp_path / "there"))
    assert there.bill.stages["gradients"].cached == STAGES["gradients"]


def test_speeds_are_measured_at_a_checkpoint(setup: Setup, tmp_path: Path) -> None:
    fresh = less_config(setup, tmp_path / "run", tmp_path / "cache", gradients={"dim": 64})
    found = measure_speeds(fresh, 4).stages
    assert found.keys() == set(STAGES)
    assert found["gradients"].values["update"] == "adamw", "plain gradients were timed"
    assert all(each.seconds > 0 and each.effort > 0 for each in found.values())


def test_a_run_computes_what_the_plan_lists(sketched: Config, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(Path(sketched.cache_url, "warmup"), cache / "warmup")
    plan = planned_and_run(other_run(sketched, tmp_path / "run", cache=str(cache)))
    assert plan.work.stages["warmup"].cached == 1


def test_in_an_object_store_it_is_the_same(sketched: Config, tmp_path: Path, s3_url: str) -> None:
    there = other_run(sketched, tmp_path / "run", cache=f"{s3_url}/less")
    run_select(there, quiet=True)
    assert_same_results(sketched.run, there.run, "checkpoints of a bucket are others")


def test_it_is_shown_which_checkpoints_count_how_much(sketched: Config) -> None:
    made = manifest_of(sketched.run).warmup
    assert made is not None
    page = Path(sketched.run, "report.html").read_text()
    rates = [each.learning_rate for each in made.record.checkpoints]
    for each in made.record.checkpoints:
        assert each.folder in page
        assert f"{each.learning_rate / sum(rates):.1%}" in page
    notes = " ".join(manifest_of(sketched.run).stages["gradients"].notes)
    steps = [each.step for each in made.record.checkpoints]
    assert all(f"after {step} steps" in notes for step in steps), notes


def test_the_cache_keeps_what_it_uses(sketched: Config, tmp_path: Path) -> None:
    path = write_config(tmp_path / "job.yaml", sketched)
    contents = scan_cache(sketched.cache_url)
    assert not contents.foreign
    use = use_of(path, sketched.cache_url)
    doomed = plan_prune(contents, use.places, timedelta(0)).doomed
    # Others here have compared the rows with other targets.
    lost = [place for place in doomed if place[0] != "contamination"]
    assert not lost, "a prune loses its shards"
    every = plan_prune(contents, (), timedelta(0)).doomed
    assert {"gradients", "target_gradients", "warmup"} <= {stage for stage, _hex in every}


def test_an_export_has_the_updates_of_every_checkpoint(sketched: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export_vectors(sketched, "gradients", str(out), command="x")
    assert done.missing == 0
    found = {path: pq.read_table(path) for path in sorted(out.glob("checkpoint-*/candidates/*"))}
    by_folder: dict[str, int] = {}
    for path, table in found.items():
        values = ExportLayout.model_validate_json(table.schema.metadata[b"influence"])
        assert values.values["update"] == "adamw"
        assert values.fingerprint in values.shard
        by_folder[path.parts[-3]] = by_folder.get(path.parts[-3], 0) + table.num_rows
        cached = pq.read_table(Path(sketched.cache_url, values.shard)).column("vector")
        wanted = [np.frombuffer(each, np.float32) for each in cached.to_pylist() if each]
        same = np.array_equal(table.column("vector").to_pylist(), wanted)
        assert same, f"{path}: not the shard's vectors"
    assert by_folder["checkpoint-1"] == by_folder["checkpoint-2"] > 60
    assert len(list(out.glob("checkpoint-2/targets/*/*"))) == 2


def vectors_at(tools: Toolbox, batches: Sequence[Any]) -> list[np.ndarray]:
    return [
        stages.gradient_vectors(tools, batches, stage).vectors
        for stage in ("gradients", "target_gradients")
    ]


def test_a_replica_gives_the_same_whatever_it_held_before(sketched: Config, setup: Setup) -> None:
    url = warmup_of(sketched)
    folders = [f"{url}/{epoch_folder(k)}" for k in (1, 2)]
    model = sketched.model.model_copy(update={"adapter": url})
    config = sketched.model_copy(update={"model": model})
    file = scan_files(setup.candidates)[0]
    encoded = make_encoder(load_tokenizer(model), 128)(read_examples(file, 0, 5))
    batches = make_batches([row for row in encoded if row.reason is None], 300)
    base = Toolbox(load_replica(model, "float32", "cpu"), stage_settings(config))
    own = vectors_at(base, batches)
    tools = CheckpointTools(base, url)
    alone = {}
    for folder in folders:
        fresh = Toolbox(
            load_replica(model.model_copy(update={"adapter": folder}), "float32", "cpu"),
            stage_settings(config),
        )
        alone[folder] = vectors_at(fresh, batches)[1]  # plain gradients need no switching
    seen: dict[str | None, list[np.ndarray]] = {None: own}
    for folder in (folders[0], folders[1], folders[0], None, folders[1], None):
        found = vectors_at(tools.at(folder), batches)
        for each, before in zip(found, seen.setdefault(folder, found), strict=True):
            np.testing.assert_array_equal(each, before, "it depends on what was loaded before")
        if folder is not None:
            np.testing.assert_array_equal(found[1], alone[folder], "the weights are not its own")
    first, second = (seen[folder] for folder in folders)
    assert not np.allclose(first[0], second[0]), "both checkpoints have the same updates"
    assert np.array_equal(seen[None][1], second[1]), "the result is not the last epoch's"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup": None}, "warmup: null .*method: less takes gradients at the checkpoints"),
        ({"warmup": {"fraction": 0}}, "warmup: null"),
        ({"warmup": {"keep_epochs": False}}, "warmup.keep_epochs: false.*expected true"),
        ({"gradients": {"parameters": "linear"}}, "gradients.parameters: 'linear'.*expected lora"),
        ({"gradients": {"projection": "exact"}}, "gradients.projection: 'exact'.*srht"),
        ({"gradients": {"projection": "layerwise"}}, "gradients.projection: 'layerwise'"),
        ({"gradients": {"normalize": False}}, "gradients.normalize: false.*cosines"),
        ({"gradients": {"norms": "exact"}}, "gradients.norms: exact.*cosines"),
        ({"weights": {"order": 2}}, "weights.order: 2 is for method: .*, not less"),
        ({"optimizer": {"kind": "adamw"}}, "optimizer.kind: adamw is for method"),
        ({"layers": "auto"}, "layers: 'auto' is for method: in2core"),
        ({"selection": {"budget": "10% of proponents"}}, "selection.budget.*method: less"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    setup: Setup, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        tiny_config(setup, tmp_path / "run", method="less", **changes)


def test_its_defaults_are_the_papers(setup: Setup, tmp_path: Path) -> None:
    given = {"data": setup.candidates, "model": setup.model}
    smallest = {
        "run": str(tmp_path / "run"),
        "model": {"name": str(given["model"])},
        "data": {"candidates": given["data"]},
        "targets": {"sums": {"path": setup.targets["sums"]["path"]}},
        "method": "less",
    }
    config = parse_config(smallest)
    assert config.warmup is not None
    assert (config.warmup.epochs, config.warmup.fraction, config.warmup.keep_epochs) == (
        4,
        0.05,
        True,
    )
    assert (config.gradients.parameters, config.gradients.dim) == ("lora", 8192)
    assert (config.selection.combine, config.targets["sums"].per) == ("max", "group")
    again = parse_config(config.model_dump(mode="json"))
    assert again == config, "a run's config.yaml does not give the run"
    rows = {"sums": {**smallest["targets"]["sums"], "per": "row"}}
    assert parse_config({**smallest, "targets": rows}).targets["sums"].per == "row"


@pytest.mark.clusters
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray(sketched: Config, tmp_path: Path) -> None:
    replicas = sketched.replicas.model_copy(update={"max": 2})
    config = other_run(sketched, tmp_path / "ray", cache=str(tmp_path / "c"), replicas=replicas)
    select_job.run_select(config, quiet=True)
    assert_same_results(sketched.run, config.run, "the order of units changed a checkpoint's shard")
