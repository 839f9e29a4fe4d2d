"""`evaluation.downstream`: against training by hand; planned, shared, resumed, refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in2core_runs import Cut, cut_after
from tiny_run import Setup, conversation, manifest_of, scores_of, tiny_config, write_config

from influence import one_process
from influence.cache import Cache
from influence.cache_use import use_of
from influence.candidates import read_examples, scan_files
from influence.config import Config
from influence.config_downstream import UNTRAINED
from influence.config_loading import load_config
from influence.errors import InputError
from influence.evaluation_tables import result_figures, result_tables
from influence.finetune import adapted, finetune
from influence.finetune_job import settings_of
from influence.held_out import row_losses
from influence.local import local_execute
from influence.one_process import run_evaluate, run_select
from influence.plan import make_plan
from influence.replica import load_replica, load_tokenizer
from influence.retraining_rows import STAGE
from influence.tokenization import make_encoder
from influence.training_data import TrainingRows

pytestmark = pytest.mark.clusters

RECIPE = {"rank": 2, "epochs": 1, "batch_size": 4, "learning_rate": 0.02}
METHODS: dict[str, Any] = {"own": {}, "rds": {"method": "rds"}}
SEEDS = (0, 1)


def write_tests(folder: Path) -> dict[str, str]:
    """Held-out rows of both targets; of `mixed` one has no response."""
    paths = {}
    for name, rows in (("sums", 4), ("mixed", 3)):
        draw = random.Random(f"test {name}")
        lines: list[Any] = [{"messages": conversation(draw)} for _ in range(rows)]
        if name == "mixed":
            lines.insert(1, {"messages": [{"role": "user", "content": "no answer"}]})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[name] = str(path)
    return paths


@pytest.fixture(scope="module")
def tests_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tests(tmp_path_factory.mktemp("tests"))


def downstream_config(
    setup: Setup, tests: dict[str, Any], run: Path | str, **changes: Any
) -> Config:
    """The run's own method, RDS+ and random on two targets, with two seeds, and the whole pool."""
    section = {"methods": METHODS, "tests": tests, "full": True, **changes.pop("downstream", {})}
    given = {"finetune": RECIPE, "evaluation": {"downstream": section, "seeds": len(SEEDS)}}
    return tiny_config(setup, run, **{**given, **changes})


@pytest.fixture(scope="module")
def evaluated(
    setup: Setup, tests_of: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """The config of an evaluation that is done."""
    config = downstream_config(setup, tests_of, tmp_path_factory.mktemp("evaluated") / "run")
    run_evaluate(config, quiet=True)
    return config


def result_of(config: Config) -> dict[str, Any]:
    return json.loads(Path(config.run, "evaluation.json").read_text())["downstream"]


def own_run(config: Config) -> str:
    return f"{config.run}/evaluations/downstream"


class ByHand:
    """A fresh model, `finetune` on rows read one by one, `row_losses`: no units, no cache."""

    def __init__(self, config: Config, tests: dict[str, str], folder: Path) -> None:
        self.config, self.folder = config, folder
        self.encode = make_encoder(load_tokenizer(config.model), config.data.max_length)
        self.pool = self._read(config.data.candidates)
        self.tests = {name: self._read([path]) for name, path in tests.items()}

    def _read(self, patterns: list[str]) -> list[Any]:
        files = scan_files(patterns)
        return [row for f in files for row in self.encode(read_examples(f, 0, f.rows - 1))]

    def losses(self, rows: list[int], seed: int, weights: Any = None) -> dict[str, np.ndarray]:
        model = load_replica(self.config.model, "float32", "cpu").model
        settings = replace(settings_of(self.config), seed=seed)
        if not rows:
            return self._losses(model, settings)
        adapter = str(self.folder / str(len(list(self.folder.iterdir()))))
        training = TrainingRows.of([self.pool[row] for row in rows], weights)
        finetune(model, training, {}, settings, adapter)
        with adapted(model, settings, adapter):
            model.eval()
            return self._losses(model, settings)

    def _losses(self, model: Any, settings: Any) -> dict[str, np.ndarray]:
        return {
            name: np.array(row_losses(model, rows, settings.token_budget))
            for name, rows in self.tests.items()
        }


def chosen_by(run: str) -> list[int]:
    """Positions of a run's selected rows."""
    weights = scores_of(run).column("weight").to_pylist()
    return [position for position, weight in enumerate(weights) if weight]


def test_losses_are_those_of_training_by_hand(
    setup: Setup, tests_of: dict[str, str], evaluated: Config, tmp_path: Path
) -> None:
    hand = ByHand(evaluated, tests_of, tmp_path)
    found = result_of(evaluated)
    reasons = scores_of(f"{own_run(evaluated)}/sums/own").column("reason").to_pylist()
    everything = [i for i, reason in enumerate(reasons) if reason is None]
    for target in tests_of:
        results = found["targets"][target]["results"]
        assert list(results) == ["untrained", "random", "own", "rds", "full"]
        for name in results:
            by_seed = []
            for seed in SEEDS:
                if name == "untrained":
                    rows = []
                elif name == "full":
                    rows = everything
                else:
                    drawn = f"-seed{seed}" if name == "random" else ""
                    rows = chosen_by(f"{own_run(evaluated)}/{target}/{name}{drawn}")
                losses = hand.losses(rows, seed)
                by_seed.append(np.nanmean(losses[target]))
            assert results[name]["by_seed"] == pytest.approx(by_seed, abs=1e-12), (
                f"{target}/{name}: other rows, order, seed or test"
            )
            assert results[name]["loss"]["mean"] == pytest.approx(np.mean(by_seed))
            if name != "untrained":
                error = np.std(by_seed, ddof=1) / np.sqrt(len(by_seed))
                assert results[name]["loss"]["error"] == pytest.approx(error)
    assert found["targets"]["mixed"]["without_loss"] == 1
    assert found["targets"]["mixed"]["rows"] == 3


def test_a_selections_cost_is_that_with_an_empty_cache(evaluated: Config, tmp_path: Path) -> None:
    """`mixed/own` found its embeddings in the cache, those of `sums/own`."""
    arm = f"{own_run(evaluated)}/mixed/own"
    assert manifest_of(arm).stages["embedding"].computed == 0, "the scene is not as it should be"
    found = result_of(evaluated)["targets"]["mixed"]["results"]["own"]["selection"]
    cold = load_config(f"{arm}/config.yaml", [f"run={tmp_path}/run", f"cache={tmp_path}/cache"])
    run_select(cold, quiet=True)
    bill = manifest_of(cold.run).bill
    assert bill is not None
    for stage in ("gradients", "embedding"):
        took = bill.stages[stage].took
        assert took is not None
        assert found["stages"][stage]["flops"] == took.flops, f"{stage}: counts what was cached"
        assert found["stages"][stage]["seconds"] > 0
    assert found["flops"] == bill.total.took.flops  # pyright: ignore[reportOptionalMemberAccess]
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"].values()))
    assert not any("assumed" in s["source"] for s in found["stages"].values())


def test_costs_of_training_and_the_front(evaluated: Config) -> None:
    targets = result_of(evaluated)["targets"]
    for each in targets.values():
        results = {n: r for n, r in each["results"].items() if n != "untrained"}
        assert each["results"]["untrained"]["training"] is None
        total = {
            n: r["training"]["flops"] + (r["selection"]["flops"] if r["selection"] else 0.0)
            for n, r in results.items()
        }
        assert results["full"]["training"]["flops"] > 3 * results["own"]["training"]["flops"]
        for name, result in results.items():
            beaten = any(
                total[o] <= total[name]
                and other["loss"]["mean"] <= result["loss"]["mean"]
                and o != name
                for o, other in results.items()
            )
            assert result["front"] == (not beaten)
    overall = result_of(evaluated)["overall"]["results"]
    for name in ("full", "random"):
        alone = targets["sums"]["results"][name]["training"]["flops"]
        assert overall[name]["training"]["flops"] == alone, "one training serves both targets"
    selecting = {
        name: [targets[t]["results"][name]["selection"]["seconds"] for t in targets]
        for name in ("random", "own")
    }
    asked_once, asked_twice = (overall[n]["selection"]["seconds"] for n in selecting)
    assert asked_once in selecting["random"], "no target is asked, and each one is billed"
    assert asked_twice == pytest.approx(sum(selecting["own"]))


def test_the_plan_counts_its_trainings(evaluated: Config) -> None:
    (note,) = (note for note in make_plan(evaluated).notes if "downstream" in note)
    record = manifest_of(own_run(evaluated)).stages[STAGE]
    cache = Cache(evaluated.cache_url)
    facts = [cache.read(key).meta["training"] for key in record.planned]
    rows = sorted({each["rows"] for each in facts if each["rows"]})
    made = f"{len(facts)} trainings of {rows[0]} to {rows[-1]} rows, each tested on 8: "
    assert made in note, f"the run made {made}"
    said = int(note.split(made)[1].split(" ")[0].replace(",", ""))
    took = sum(each["tokens"] for each in facts)
    assert said == pytest.approx(took, rel=0.1), "rows of mean length are trained on otherwise"
    plain = evaluated.model_copy(update={"evaluation": type(evaluated.evaluation)()})
    assert not any("evaluate" in note for note in make_plan(plain).notes)


def test_it_is_shown_with_its_front(evaluated: Config) -> None:
    document = {"downstream": result_of(evaluated)}
    ((table, figures),) = result_figures(evaluated.run, document)
    assert result_tables(evaluated.run, document) == [table, *table.further]
    first = [row[0] for row in table.rows]
    for text in ("sums: rds", "mixed: the whole pool", "all targets: own"):
        assert text in first
    for target, pairs in zip(("sums", "mixed", "all targets"), table.further, strict=True):
        assert target in pairs.title
        group = document["downstream"]["overall"]
        group = document["downstream"]["targets"].get(target, group)
        names = [name for name in group["results"] if name != UNTRAINED]
        for pair in group["contrasts"]:
            if UNTRAINED in (pair["of"], pair["against"]):
                continue
            i, j = (names.index(pair[side]) for side in ("of", "against"))
            value = pair["value"]
            sure = pair["low"] * pair["high"] > 0
            for row, column, sign in ((i, j, 1), (j, i, -1)):
                cell = pairs.rows[row][1 + column].replace("\N{MINUS SIGN}", "-")
                assert float(cell.rstrip("*")) == pytest.approx(sign * value, abs=6e-4), cell
                assert cell.endswith("*") == sure, "a difference that may be 0 is shown as sure"
    assert len({len(row) for row in table.rows} | {len(table.headings)}) == 1
    assert "mixed: 1 test rows have no response" in table.caption
    assert len(figures) == 3
    assert "Pareto front: random" in figures[0].alt


def cut_config(setup: Setup, tests: dict[str, str], evaluated: Config, run: Path) -> Config:
    """Another recipe, over the cache of the evaluation that is done: one target, with weights."""
    return downstream_config(
        setup,
        {"sums": {"path": tests["sums"], "exact_match": True, "max_new_tokens": 3}},
        run,
        cache=evaluated.cache_url,
        targets={"sums": setup.targets["sums"]},
        finetune={**RECIPE, "learning_rate": 0.01},
        downstream={"weighted": True, "full": False},
    )


def test_one_that_was_cut_short_trains_what_is_missing(
    setup: Setup,
    tests_of: dict[str, str],
    evaluated: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = cut_config(setup, tests_of, evaluated, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(
            one_process,
            "local_execute",
            lambda config, watch: cut_after(local_execute(config, watch), 3, STAGE),
        )
        with pytest.raises(Cut):
            run_evaluate(config, quiet=True)
    assert not Path(config.run, "evaluation.json").exists()
    chosen: list[str] = []
    monkeypatch.setattr(
        one_process, "run_select", lambda config, **_: chosen.append(config.run) or {}
    )
    run_evaluate(config, quiet=True)
    assert not chosen, "selections that are done are made again"
    record = manifest_of(own_run(config)).stages[STAGE]
    # Not trained, and two seeds of three selections.
    assert (record.reused, record.computed) == (3, 4), "committed trainings are made again"
    hand = ByHand(config, tests_of, tmp_path_of(tmp_path))
    found = result_of(config)["targets"]["sums"]["results"]["own"]["by_seed"]
    run = f"{own_run(config)}/sums/own"
    weights = np.array([w for w in scores_of(run).column("weight").to_pylist() if w])
    expected = hand.losses(chosen_by(run), 1, weights)["sums"].mean()
    assert found[1] == pytest.approx(expected, abs=1e-12), "not the selection's weights"
    answers = [Cache(config.cache_url).read(key).floats("correct").mean() for key in record.planned]
    results = result_of(config)["targets"]["sums"]["results"].values()
    assert sum(r["exact_match"]["mean"] for r in results) == pytest.approx(
        answers[0] + sum(answers[1:]) / 2
    ), "another part of right answers than the shards hold"
    assert any("Exact match" in t.headings for t in result_tables(config.run, _document(config)))


def _document(config: Config) -> dict[str, Any]:
    return {"downstream": result_of(config)}


def tmp_path_of(folder: Path) -> Path:
    """An empty folder inside."""
    own = folder / "by-hand"
    own.mkdir()
    return own


def refusal(config: Config) -> str:
    with pytest.raises(InputError) as caught:
        run_evaluate(config, quiet=True)
    return str(caught.value)


def test_what_has_changed_is_refused_or_trained_anew(
    setup: Setup, tests_of: dict[str, str], evaluated: Config, tmp_path: Path
) -> None:
    run, before = evaluated.run, manifest_of(own_run(evaluated))

    def config(**changes: Any) -> Config:
        return downstream_config(setup, tests_of, run, **changes)

    text = refusal(config(downstream={"methods": {**METHODS, "rds": {"method": "exact"}}}))
    assert "evaluation.downstream.methods.rds.method: was 'rds', now 'exact'" in text
    text = refusal(config(landmarks__count=20))
    assert "evaluation.downstream.methods.own.landmarks.count: was 24, now 20" in text
    text = refusal(config(finetune={**RECIPE, "rank": 3}))
    assert "evaluation.downstream.finetune.rank: was 2, now 3" in text
    assert "--replace" in text
    assert manifest_of(own_run(evaluated)) == before
    # The same path, another content: found by what is in it.
    tests = {name: str(tmp_path / f"{name}.jsonl") for name in tests_of}
    for name, path in tests.items():
        Path(path).write_text(Path(tests_of[name]).read_text())
    own = downstream_config(
        setup, tests, tmp_path / "run", cache=evaluated.cache_url, downstream={"full": False}
    )
    run_evaluate(own, quiet=True)
    assert manifest_of(own_run(own)).stages[STAGE].computed == 0, "trained for a path's sake"
    lines = Path(tests["sums"]).read_text().splitlines()
    Path(tests["sums"]).write_text("\n".join(lines[1:]) + "\n")
    run_evaluate(own, quiet=True)
    record = manifest_of(own_run(own)).stages[STAGE]
    # Not trained, two draws that serve both targets, and two seeds of four selections.
    assert (record.reused, record.computed) == (0, 11), "equal trainings are made once"
    assert result_of(own)["targets"]["sums"]["rows"] == 3


def test_one_failing_selection_fails_the_whole_by_its_name(
    setup: Setup, tests_of: dict[str, str], evaluated: Config, tmp_path: Path
) -> None:
    broken = {"method": "in2core", "reference": {"adapter": str(tmp_path / "nowhere")}}
    config = downstream_config(
        setup,
        {"sums": tests_of["sums"]},
        tmp_path / "run",
        cache=evaluated.cache_url,
        targets={"sums": setup.targets["sums"]},
        downstream={"methods": {"broken": broken, **METHODS}, "full": False},
    )
    text = refusal(config)
    assert "evaluation.downstream: 1 selection(s) failed" in text
    assert "  sums/broken: " in text
    assert "nowhere" in text
    assert not Path(config.run, "evaluation.json").exists(), "a comparison without one of them"
    for name in ("own", "rds", "random-seed1"):
        assert manifest_of(f"{own_run(config)}/sums/{name}").state == "done"
    record = manifest_of(own_run(config)).stages[STAGE]
    assert record.shards == record.reused + record.computed == 7, "the others are not trained on"


def test_the_cache_keeps_trainings_and_what_selections_used(
    evaluated: Config, tmp_path: Path
) -> None:
    places = use_of(write_config(tmp_path / "job.yaml", evaluated), evaluated.cache_url).places
    record = manifest_of(own_run(evaluated)).stages[STAGE]
    for key in record.planned:
        assert (STAGE, key.split("/")[1]) in places, "prune would remove trainings"
    own = manifest_of(f"{own_run(evaluated)}/sums/rds").stages["embedding"]
    assert ("embedding", own.fingerprint) in places, "prune would remove what a method needs"


def test_on_ray_the_losses_are_the_same(
    setup: Setup,
    tests_of: dict[str, str],
    evaluated: Config,
    tmp_path: Path,
    ray_cluster: None,
) -> None:
    from ray_jobs.evaluate import run_evaluate as run_on_ray

    config = downstream_config(
        setup,
        {"sums": tests_of["sums"]},
        tmp_path / "run",
        targets={"sums": setup.targets["sums"]},
        downstream={"full": False, "seeds": 1, "methods": {"rds": {"method": "rds"}}},
        replicas__max=2,
    )
    run_on_ray(config, quiet=True)
    found = result_of(config)["targets"]["sums"]["results"]
    expected = result_of(evaluated)["targets"]["sums"]["results"]
    for name, result in found.items():
        assert result["by_seed"] == pytest.approx(expected[name]["by_seed"][:1], abs=1e-12), (
            f"{name}: a loss depends on who computed what"
        )
        assert result["loss"]["error"] is None
