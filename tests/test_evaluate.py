"""`influence evaluate`: class detection against oracles on the same shards; resume, Ray, errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datainf_oracle import influences_by_loops
from in2core_runs import Cut, cut_after, gradients_of
from sklearn.metrics import roc_auc_score
from tiny_run import (
    Setup,
    conversation,
    manifest_of,
    shards_in,
    tiny_config,
    write_config,
)

from influence import one_process
from influence.cache import Cache
from influence.cache_use import use_of
from influence.candidates import read_column
from influence.cli import main
from influence.config import Config
from influence.curvature_units import STAGE
from influence.errors import InputError
from influence.evaluations import EVALUATIONS
from influence.local import local_execute
from influence.one_process import run_evaluate, run_select
from influence.pipeline import prepare
from influence.progress import Progress
from influence.report import build_report

pytestmark = pytest.mark.clusters

KINDS = ("apples", "boats", "code")
METHODS = ("datainf", "gradient_product", "cosine", "rds")


def kind_of(row: int) -> str:
    return KINDS[row % len(KINDS)]


@pytest.fixture(scope="module")
def labelled(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Two files of candidates with a column `kind`, and two targets with it.

    Of 30 candidates one is a duplicate, one is malformed and one has no class; one of 8 target rows
    has a class of its own.
    """
    folder = tmp_path_factory.mktemp("labelled")
    draw = random.Random("labelled")
    rows = [{"messages": conversation(draw), "kind": kind_of(i)} for i in range(16)]
    rows[9] = rows[6]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pool-a.parquet")
    lines: list[Any] = [{"messages": conversation(draw), "kind": kind_of(i)} for i in range(14)]
    lines[3] = {"text": "of no known form", "kind": KINDS[0]}
    del lines[8]["kind"]
    (folder / "pool-b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    targets = {}
    for name, kinds in (("dev", (*KINDS, "unseen")), ("test", KINDS[:2] * 2)):
        lines = [{"messages": conversation(draw), "kind": kind} for kind in kinds]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        targets[name] = {"path": str(path)}
    targets["test"]["group_by"] = "kind"
    return Setup(setup.model, folder, [str(folder / "pool-*")], targets)


def evaluation_config(labelled: Setup, run: Path | str, adapter: str, **changes: Any) -> Config:
    """Whole gradients of the adapter's factors, in shards of eight rows."""
    given = {
        "method": "in2core",
        "reference__adapter": adapter,
        "gradients__projection": "none",
        "evaluation__class_detection__column": "kind",
    }
    return tiny_config(labelled, run, **{**given, **changes})


@pytest.fixture(scope="module")
def evaluated(labelled: Setup, adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of an evaluation that is done."""
    config = evaluation_config(labelled, tmp_path_factory.mktemp("evaluated") / "run", adapter)
    run_evaluate(config, quiet=True)
    return config


def result_of(config: Config) -> dict[str, Any]:
    return json.loads(Path(config.run, "evaluation.json").read_text())["class_detection"]


def figures_of(config: Config) -> dict[str, Any]:
    """All that must be the same however it was run."""
    found = result_of(config)
    return {name: found[name] for name in (*METHODS, "by_class")}


def own_run(config: Config) -> str:
    return f"{config.run}/evaluations/class_detection"


def expected_rankings(config: Config) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(rows x targets by each method, classes of rows, of targets), from the shards, in loops."""
    own = EVALUATIONS["class_detection"].settings(config)
    job = prepare(own, Progress(quiet=True))
    manifest = manifest_of(own_run(config))
    rows: list[tuple[str, int]] = []
    labels: list[str] = []
    for file in job.files:
        kinds = read_column(file, "kind")
        assert kinds is not None
        for row in range(file.rows):
            left_out = (file.url[-7:], row) in (("parquet", 9), ("b.jsonl", 3), ("b.jsonl", 8))
            if not left_out:
                rows.append((file.content_hash, row))
                labels.append(kinds[row])
    targets = [
        (file.content_hash, row)
        for fs in job.target_files.values()
        for file in fs
        for row in range(file.rows)
    ]
    wanted = [
        kind
        for fs in job.target_files.values()
        for file in fs
        for kind in read_column(file, "kind") or []
    ]
    gradients = {
        content: gradients_of(config.cache_url, manifest, content, unit=False)
        for content in {content for content, _ in [*rows, *targets]}
    }
    blocks = next(iter(gradients.values()))[-1][0]
    G, V = (
        np.stack([gradients[content][row][0] for content, row in some]).astype(np.float64)
        for some in (rows, targets)
    )
    # The row without a class has no rank, but counts in DataInf's curvature.
    unlabelled = next(c for c in gradients if c == job.files[1].content_hash)
    everything = np.concatenate([G, gradients[unlabelled][8][0][None].astype(np.float64)])
    unit = [X / np.linalg.norm(X, axis=1, keepdims=True) for X in (G, V)]
    embedding = {}
    for key in manifest.stages["embedding"].planned:
        shard = Cache(config.cache_url).read(key)
        content = key.split("/")[-1].split("-")[0]
        for row, vector in zip(shard.table.column("row").to_pylist(), shard.vectors(), strict=True):
            embedding[content, row] = vector.astype(np.float64)
    E, T = (np.stack([embedding[each] for each in some]) for some in (rows, targets))
    rankings = {
        "datainf": -influences_by_loops(everything, V, blocks)[: len(G)],
        "gradient_product": G @ V.T,
        "cosine": unit[0] @ unit[1].T,
        "rds": E @ T.T,
    }
    return rankings, np.array(labels), np.array(wanted)


def test_figures_are_those_of_the_oracle_on_the_same_gradients(evaluated: Config) -> None:
    rankings, labels, wanted = expected_rankings(evaluated)
    found = result_of(evaluated)
    judged = [t for t, kind in enumerate(wanted) if kind in KINDS]
    everything = [(name, "", P) for name, P in rankings.items()]
    everything += [(name, "_by_size", np.abs(P)) for name, P in rankings.items()]
    for name, kind, P in everything:
        aucs, recalls = [], []
        for t in judged:
            own = labels == wanted[t]
            aucs.append(roc_auc_score(own, P[:, t]))
            first = np.argsort(-P[:, t], kind="stable")[: own.sum()]
            recalls.append(own[first].mean())
        # One pair of rows that changes places by rounding: 1 / (9 x 18 pairs x 7 target rows).
        figures = {key: found[name][f"{key}{kind}"] for key in ("auc", "recall")}
        assert figures["auc"] == pytest.approx(np.mean(aucs), abs=2e-3), name + kind
        assert figures["recall"] == pytest.approx(np.mean(recalls), abs=2e-2), name + kind
        error = np.std(aucs, ddof=1) / np.sqrt(len(judged))
        assert found[name][f"auc{kind}_se"] == pytest.approx(error, abs=2e-3), name + kind
    by_class = found["by_class"]
    assert sum(each["target_rows"] for each in by_class.values()) == len(judged)
    for name in METHODS:
        mean = sum(each["auc"][name] * each["target_rows"] for each in by_class.values())
        assert mean / len(judged) == pytest.approx(found[name]["auc"])


def test_what_was_ranked_and_left_out_is_counted(evaluated: Config) -> None:
    about = result_of(evaluated)["about"]
    assert about["candidates"] == 27
    assert about["target_rows"] == 7
    assert about["classes"] == 3
    assert about["candidates_left_out"] == {
        "duplicates among the candidates": 1,
        "candidates without a score": 1,
        "candidates without a class": 1,
    }
    assert about["target_rows_left_out"] == {"target rows of a class that no candidate has": 1}
    assert about["influence_seconds"] > 0
    manifest = manifest_of(own_run(evaluated))
    assert manifest.state == "done"
    assert not shards_in(Path(own_run(evaluated), "scoring")), "scores of the rankings are left"


@pytest.mark.parametrize(("stage", "after"), [("gradients", 3), (STAGE, 2), ("scores", 5)])
def test_an_evaluation_that_was_cut_short_goes_on_to_the_same_figures(
    labelled: Setup,
    adapter: str,
    evaluated: Config,
    tmp_path: Path,
    stage: str,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = evaluation_config(labelled, tmp_path / "run", adapter)
    with monkeypatch.context() as patched:
        patched.setattr(
            one_process,
            "local_execute",
            lambda config, watch: cut_after(local_execute(config, watch), after, stage),
        )
        with pytest.raises(Cut):
            run_evaluate(config, quiet=True)
    assert not Path(config.run, "evaluation.json").exists()
    assert manifest_of(own_run(config)).state == "failed"
    before = shards_in(config.cache_url)
    run_evaluate(config, quiet=True)
    assert figures_of(config) == figures_of(evaluated)
    record = manifest_of(own_run(config)).stages["gradients"]
    kept = sum(key.startswith("gradients/") for key in before)
    assert record.reused == kept, "gradients that were committed are taken again"
    seconds = result_of(config)["about"]["influence_seconds"]
    assert (seconds is None) == (stage != "gradients"), "the time of a part passes for the whole"


def test_it_shares_the_cache_with_select_and_stands_in_its_report(
    labelled: Setup, adapter: str, evaluated: Config, tmp_path: Path
) -> None:
    config = evaluation_config(labelled, tmp_path / "run", adapter, cache=evaluated.cache_url)
    run_select(config, quiet=True)
    assert manifest_of(config.run).stages["gradients"].computed == 0
    assert "Class detection" not in Path(config.run, "report.html").read_text()
    manifest = Path(config.run, "manifest.json").read_bytes()
    run_evaluate(config, quiet=True)
    stages = manifest_of(own_run(config)).stages
    assert {name: stages[name].computed for name in ("gradients", "embedding")} == {
        "gradients": 0,
        "embedding": 0,
    }
    assert figures_of(config) == figures_of(evaluated)
    assert Path(config.run, "manifest.json").read_bytes() == manifest, "the selection's record"
    page = Path(config.run, "report.html").read_text()
    section = page[page.index('id="evaluation"') : page.index('id="stages"')]
    for text in ("DataInf", "RDS+ embeddings", "Column kind: 3 classes, 27 candidates"):
        assert text in section
    assert f"{result_of(config)['datainf']['auc']:.3f}±" in section
    run_select(config, quiet=True)  # an evaluation is no other config of the selection
    assert Path(config.run, "evaluation.json").exists()
    Path(config.run, "evaluation.json").write_text('{"class_detection": {"datainf": 1}}')
    with pytest.raises(InputError, match=r"evaluation\.json: class_detection\.datainf"):
        build_report(config.run)


def test_the_cache_keeps_what_an_evaluation_uses(evaluated: Config, tmp_path: Path) -> None:
    places = use_of(write_config(tmp_path / "job.yaml", evaluated), evaluated.cache_url).places
    for stage in ("catalogue", "gradients", "embedding"):
        record = manifest_of(own_run(evaluated)).stages[stage]
        assert (stage, record.fingerprint) in places, f"prune would remove the {stage} shards"


def refusal(config: Config) -> str:
    with pytest.raises(InputError) as caught:
        run_evaluate(config, quiet=True)
    return str(caught.value)


def test_bad_classes_are_refused_before_a_model_runs(
    labelled: Setup, adapter: str, evaluated: Config, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")

    def config(name: str, **changes: Any) -> Config:
        return evaluation_config(labelled, tmp_path / name, adapter, cache=cache, **changes)

    asked = {"finetune": {}}
    text = refusal(config("near", evaluation__class_detection__column="kidn", reference=asked))
    assert "evaluation.class_detection.column: " in text
    assert "pool-a.parquet: no column 'kidn'; did you mean 'kind'?" in text
    assert not Path(own_run(config("near")), "manifest.json").exists(), "a typo is held for a run"
    text = refusal(config("far", evaluation__class_detection__column="zzz"))
    assert "its columns: messages, kind" in text
    path = tmp_path / "bare.jsonl"
    lines = Path(labelled.targets["dev"]["path"]).read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), "kind": None})]))
    text = refusal(config("bare", targets={"bare": {"path": str(path)}}))
    assert f"{path} row 4: no value in the column 'kind'" in text
    path.write_text(lines[3])
    text = refusal(config("other", targets={"bare": {"path": str(path)}}))
    assert "no candidate has a class of the target rows (unseen)" in text
    assert "those of the candidates: apples, boats, code" in text
    assert not any(key.startswith("gradients") for key in shards_in(cache))
    assert not Path(cache, "reference").exists(), "a reference was trained before its use was known"
    text = refusal(config("none", evaluation={}))
    assert "evaluation: names nothing to measure; known: class_detection" in text
    changed = evaluated.model_copy(update={"data": evaluated.data.model_copy(update={"limit": 20})})
    text = refusal(changed)
    assert "data.limit: was None, now 20" in text
    assert "--replace" in text


def test_on_ray_the_figures_are_the_same(
    labelled: Setup,
    adapter: str,
    evaluated: Config,
    tmp_path: Path,
    ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = evaluation_config(labelled, tmp_path / "run", adapter, replicas__max=2)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", write_config(tmp_path / "job.yaml", config)])
    assert caught.value.code == 0
    assert figures_of(config) == figures_of(evaluated), "a figure depends on who computed what"
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("Class detection", "cosine of gradients", "evaluation.json"):
        assert text in printed
