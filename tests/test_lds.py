"""`evaluation.lds` and `leave_one_out` against training by hand; resume, Ray, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in2core_runs import Cut, cut_after
from retraining_oracle import trained_by_hand
from scipy import stats
from tiny_run import Setup, manifest_of, scores_of, shards_in, tiny_config, write_config

from influence import one_process
from influence.candidates import scan_files
from influence.cli import main
from influence.config import Config
from influence.config_loading import parse_config
from influence.datamodeling import draw_subsets, extremes, left_out_weights
from influence.errors import InputError
from influence.evaluations import EVALUATIONS
from influence.local import local_execute
from influence.one_process import run_evaluate
from influence.plan import make_plan
from influence.retraining import STAGE
from influence.retraining_rows import Training

pytestmark = pytest.mark.clusters

RECIPE = {"rank": 2, "epochs": 1, "batch_size": 4, "learning_rate": 0.02}
LDS: dict[str, Any] = {
    "rows": 20,
    "subsets": 5,
    "fraction": 0.4,
    "seeds": 2,
    "methods": {"own": {}, "rds": {"method": "rds"}},
}
LOO: dict[str, Any] = {"rows": 16, "each": 2, "random": 4, "seeds": 2, "methods": {"own": None}}


def lds_config(setup: Setup, run: Path | str, **changes: Any) -> Config:
    given = {"method": "exact", "finetune": RECIPE, "evaluation": {"lds": LDS}}
    return tiny_config(setup, run, **{**given, **changes})


@pytest.fixture(scope="module")
def evaluated(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of both evaluations, which are done."""
    config = lds_config(
        setup,
        tmp_path_factory.mktemp("evaluated") / "run",
        evaluation={"lds": LDS, "leave_one_out": LOO},
    )
    run_evaluate(config, quiet=True)
    return config


def result_of(config: Config, name: str = "lds") -> dict[str, Any]:
    return json.loads(Path(config.run, "evaluation.json").read_text())[name]


def own_run(config: Config, name: str = "lds") -> str:
    return f"{config.run}/evaluations/{name}"


def retrained_by_hand(
    config: Config, name: str, trainings: list[Training], folder: Path
) -> dict[str, np.ndarray]:
    """Losses of trainings on rows of the small pool, by target: (trainings, rows)."""
    files = scan_files([f"{own_run(config, name)}/pool.jsonl"])
    tests = {target: scan_files([each.path]) for target, each in config.targets.items()}
    found: dict[str, list[list[float]]] = {}
    for number, training in enumerate(trainings):
        own = trained_by_hand(config, files, tests, training, folder / str(number))
        for target, losses in own.items():
            found.setdefault(target, []).append(losses)
    return {target: np.array(losses) for target, losses in found.items()}


def spearman(a: Any, b: Any) -> float:
    found: Any = stats.spearmanr(a, b)
    return float(found.statistic)


def test_figures_are_those_of_training_on_the_subsets_by_hand(
    evaluated: Config, tmp_path: Path
) -> None:
    subsets = draw_subsets(20, 5, 0.4, seed=0)
    trainings = [Training(np.flatnonzero(s), seed=seed) for seed in (0, 1) for s in subsets]
    truth = retrained_by_hand(evaluated, "lds", trainings, tmp_path)
    document = result_of(evaluated)
    assert document["about"]["rows_each"] == 8
    for target, losses in truth.items():
        mean = losses.reshape(2, 5, -1).mean(axis=0)
        told = document["truth"][target]
        assert told["mean"] == pytest.approx(mean.mean())
        assert told["sd"] == pytest.approx(mean.mean(axis=1).std(ddof=1))
        for method in ("own", "rds"):
            scores = scores_of(f"{own_run(evaluated)}/{method}")
            sums = [scores.column(f"score.{target}").to_numpy()[s].sum() for s in subsets]
            found = document["methods"][method][target]
            expected = spearman(sums, -mean.mean(axis=1))
            assert found["lds"]["value"] == pytest.approx(expected), (method, target)
            each = []
            for row in range(mean.shape[1]):
                own = scores.column(f"score.{target}.rows/{row:06d}").to_numpy()
                each.append(spearman([own[s].sum() for s in subsets], -mean[:, row]))
            assert found["by_row"]["value"] == pytest.approx(np.mean(each)), (method, target)
            assert found["by_row"]["rows"] == mean.shape[1]


def test_the_scores_by_row_are_those_whose_mean_is_the_targets(evaluated: Config) -> None:
    """`sums` has a score for each row, and the score of `mixed` is a mean over its two groups."""
    scores = scores_of(f"{own_run(evaluated)}/own")
    columns = [scores.column(f"score.sums.rows/{row:06d}").to_numpy() for row in range(5)]
    assert scores.column("score.sums").to_numpy() == pytest.approx(np.mean(columns, axis=0))
    names = [name for name in scores.column_names if name.startswith("score.mixed/")]
    assert names == ["score.mixed/x", "score.mixed/y"]


def test_leaving_out_is_training_without_a_row_and_all_else_the_same(
    evaluated: Config, tmp_path: Path
) -> None:
    """By hand, and with another row in its place: whatever stands there must not count."""
    document = result_of(evaluated, "leave_one_out")
    pool = Path(own_run(evaluated, "leave_one_out"), "pool.jsonl")
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    scores = scores_of(f"{own_run(evaluated, 'leave_one_out')}/own")
    ranks = [
        stats.rankdata(scores.column(f"score.{target}").to_numpy()) for target in evaluated.targets
    ]
    best = int(np.argmax(np.mean(ranks, axis=0)))
    everything = np.arange(16)
    other = np.where(everything == best, (best + 1) % 16, everything)
    weights = left_out_weights(16, best)
    trainings = [
        Training(everything, None, 0),
        Training(everything, weights, 0),
        Training(other, weights, 0),
        Training(everything, None, 1),
        Training(everything, weights, 1),
    ]
    truth = retrained_by_hand(evaluated, "leave_one_out", trainings, tmp_path)
    top = document["rows"][0]
    assert top["group"] == "top"
    for target, losses in truth.items():
        assert losses[1] == pytest.approx(losses[2], rel=1e-5), "the row left out still counts"
        assert np.abs(losses[1] - losses[0]).max() > 1e-4, "nothing was left out"
        rise = np.mean([losses[1] - losses[0], losses[4] - losses[3]])
        assert top["rise"][target] == pytest.approx(rise, abs=1e-9)
    assert len(document["rows"]) == 8
    assert len(rows) == 16
    for target in evaluated.targets:
        assert len(set(scores.column("id").to_pylist())) == 16
        rises = [row["rise"][target] for row in document["rows"]]
        found = document["spearman"]["own"][target]
        at_random = extremes(np.arange(16.0), 2, 4, seed=0)["random"]
        own = scores.column(f"score.{target}").to_numpy()[at_random]
        rises_there = [r["rise"][target] for r in document["rows"] if r["group"] == "random"]
        by_hand = stats.spearmanr(own, rises_there).statistic
        assert found["value"] == pytest.approx(by_hand), "not over the random rows"
        assert found["low"] is None, "an interval of four rows"
        assert document["truth"][target]["rise"]["top"]["mean"] == pytest.approx(np.mean(rises[:2]))


def test_the_plan_counts_their_trainings(evaluated: Config) -> None:
    notes = make_plan(evaluated).notes
    for name in ("lds", "leave_one_out"):
        (note,) = (note for note in notes if f"evaluate, {name}: " in note)
        made = manifest_of(own_run(evaluated, name)).stages[STAGE].shards
        assert f" {made} trainings of " in note, f"the run made {made}; the plan: {note}"


def test_one_that_was_cut_short_trains_what_is_missing(
    setup: Setup, evaluated: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lds_config(setup, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(
            one_process,
            "local_execute",
            lambda config, watch: cut_after(local_execute(config, watch), 4, STAGE),
        )
        with pytest.raises(Cut):
            run_evaluate(config, quiet=True)
    assert not Path(config.run, "evaluation.json").exists()
    kept = [key for key in shards_in(config.cache_url) if key.startswith(STAGE)]
    assert len(kept) == 4
    run_evaluate(config, quiet=True)
    record = manifest_of(own_run(config)).stages[STAGE]
    assert (record.reused, record.computed) == (4, 6)
    assert result_of(config) == result_of(evaluated)


def test_other_methods_and_more_subsets_reuse_every_training(
    setup: Setup, evaluated: Config, tmp_path: Path
) -> None:
    section = {**LDS, "subsets": 6, "methods": {"random": {"method": "random"}}}
    cache = {"cache": evaluated.cache_url}
    config = lds_config(setup, tmp_path / "run", evaluation={"lds": section}, **cache)
    run_evaluate(config, quiet=True)
    record = manifest_of(own_run(config)).stages[STAGE]
    assert (record.reused, record.computed) == (10, 2), "trainings of another run are not found"
    random = result_of(config)["methods"]["random"]["sums"]
    assert random["lds"]["rows"] == 1
    assert -1 <= random["lds"]["value"] <= 1


def test_named_tests_take_the_targets_place(
    setup: Setup, evaluated: Config, tmp_path: Path
) -> None:
    tests = {"sums": setup.targets["mixed"]["path"]}
    section = {
        **LDS,
        "seeds": 1,
        "subsets": 4,
        "tests": tests,
        "methods": {"rds": LDS["methods"]["rds"]},
    }
    config = lds_config(setup, tmp_path / "run", evaluation={"lds": section})
    document = run_evaluate(config, quiet=True)["lds"]
    assert document["truth"]["sums"]["rows"] == 6
    assert document["truth"]["sums"]["reliability"] is None
    found = document["methods"]["rds"]
    assert list(found) == ["sums"]
    assert found["sums"]["by_row"] is None, "scores of other rows were held against the losses"


def test_a_method_may_have_a_warm_up_that_is_not_made(setup: Setup, tmp_path: Path) -> None:
    """Made on the small pool, for the scores alone: the trainings begin with the plain model."""
    warm = {"fraction": 0.5, "epochs": 1, "rank": 2}
    section = {**LDS, "seeds": 1, "subsets": 4, "methods": {"plain": {"warmup": None}, "warm": {}}}
    config = lds_config(setup, tmp_path / "run", warmup=warm, evaluation={"lds": section})
    document = run_evaluate(config, quiet=True)["lds"]
    assert document["about"]["adapter"] is None
    plain, warmed = (scores_of(f"{own_run(config)}/{name}") for name in ("plain", "warm"))
    assert plain.column("score.sums").to_pylist() != warmed.column("score.sums").to_pylist()
    cold = {**section, "methods": {"plain": {}}}
    other = lds_config(setup, tmp_path / "cold", cache=config.cache_url, evaluation={"lds": cold})
    assert run_evaluate(other, quiet=True)["lds"]["truth"] == document["truth"]
    assert manifest_of(own_run(other)).stages[STAGE].computed == 0


def refusal(config: Config) -> str:
    with pytest.raises(InputError) as caught:
        run_evaluate(config, quiet=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"methods": {"a": {"metod": "rds"}}}, ("evaluation.lds.methods.a", "metod", "method")),
        ({"methods": {"a": {"gradients": {"side": 3}}}}, ("methods.a", "gradients.side", "even")),
        ({"methods": {"a": {"run": "x"}}}, ("evaluation.lds.methods.a.run", "leave it out")),
        ({"methods": {"a": {"data": {"limit": 3}}}}, ("methods.a.data.limit", "leave it out")),
        ({"tests": {"sum": "x.jsonl"}}, ("evaluation.lds.tests.sum", "sums, mixed")),
        ({"tests": {"sums": "/no/x.jsonl"}}, ("evaluation.lds.tests.sums.path", "/no/x.jsonl")),
        ({"rows": 4}, ("4 rows can be trained on", "8")),
    ],
)
def test_what_cannot_be_compared_is_refused(
    setup: Setup, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config = lds_config(setup, tmp_path / "run", evaluation={"lds": {**LDS, **changes}})
    text = refusal(config)
    for part in parts:
        assert part in text, text
    assert not any(key.startswith(STAGE) for key in shards_in(config.cache_url))


def test_tables_show_every_method_and_target(evaluated: Config) -> None:
    table = EVALUATIONS["lds"].table(result_of(evaluated))
    assert [row[0] for row in table.rows] == ["sums: own", "sums: rds", "mixed: own", "mixed: rds"]
    assert "5 random subsets of 8 of 20 candidates, with 2 seeds each" in table.caption
    table = EVALUATIONS["leave_one_out"].table(result_of(evaluated, "leave_one_out"))
    assert [row[0] for row in table.rows] == ["sums: own", "mixed: own"]
    assert "8 of 16 candidates" in table.caption


def test_on_ray_the_figures_are_the_same(
    setup: Setup,
    evaluated: Config,
    tmp_path: Path,
    ray_cluster: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The methods' runs and the trainings take turns on one core each."""
    config = lds_config(setup, tmp_path / "run", replicas__max=2)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", write_config(tmp_path / "job.yaml", config)])
    assert caught.value.code == 0
    assert result_of(config) == result_of(evaluated), "a figure depends on who computed what"
    assert "Linear datamodeling score" in " ".join(capsys.readouterr().out.split())


def test_a_method_is_the_config_with_its_changes_and_nothing_of_another(
    setup: Setup, tmp_path: Path
) -> None:
    """In2Core's reference and its gradients are no part of RDS+, and the pool is the small one."""
    config = lds_config(
        setup,
        tmp_path / "run",
        method="in2core",
        reference={"finetune": {"epochs": 1}},
        selection={"budget": 10, "per_source": {"maths": {"max": 0.5}}},
        evaluation={
            "lds": {"methods": {"own": {}, "exact": {"method": "exact", "gradients": {"dim": 32}}}}
        },
    )
    own = EVALUATIONS["lds"].settings(config)
    assert own.evaluation.lds is not None
    whole = {name: parse_config(each) for name, each in own.evaluation.lds.methods.items()}
    assert whole["own"].method == "in2core"
    assert whole["own"].reference.finetune is not None
    assert whole["own"].gradients.parameters == "lora"
    exact = whole["exact"]
    assert exact.reference.finetune is None
    assert (exact.gradients.parameters, exact.gradients.projection) == ("linear", "kronecker")
    assert (exact.gradients.side, exact.gradients.dim) == (8, 32)
    for name, each in whole.items():
        assert each.data.candidates == [f"{own.run}/pool.jsonl"]
        assert each.run == f"{own.run}/{name}"
        assert each.cache_url == config.cache_url
        assert float(str(each.selection.budget).rstrip("%")) == 50
        assert not each.selection.per_source
        assert list(each.targets) == ["sums", "mixed", "sums.rows", "mixed.rows"]
