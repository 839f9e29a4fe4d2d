"""The benchmark scripts' own arithmetic: bootstrap, draws, training step, truth against claim."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_rows import encoded, row_loss
from run_fixture import spearman, write_run
from tiny_models import tiny_model
from tiny_run import Setup

from influence.errors import InputError
from influence.gradients import attributed_layers
from influence.projection import layer_shapes, make_kronecker

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common
import in2core_experiment
import in2core_report
import lora_training
import sketch_sides
import true_fidelity
import worth
import worth_report


def test_spread_is_even_and_distinct():
    for count, limit in product((1, 5, 16, 180), (1, 3, 16, 200)):
        chosen = common.spread(count, limit)
        assert len(set(chosen.tolist())) == min(count, limit)
        assert chosen.max() < count
        gaps = np.diff(np.append(chosen, count))
        assert gaps.max() - gaps.min() <= 1, "gaps differ: rows sorted by task are not covered"


def test_random_is_redrawn_for_each_seed_from_scored_rows_only():
    eligible = [i for i in range(200) if i % 3]
    draws = [worth.draw_random(eligible, 30, seed) for seed in range(200)]
    assert draws[0] == worth.draw_random(eligible, 30, 0)
    assert all(len(set(draw)) == 30 and set(draw) <= set(eligible) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=200)[eligible]
    expected = 200 * 30 / len(eligible)
    assert np.abs(counts - expected).max() < 5 * expected**0.5, "draws are not uniform"
    with pytest.raises(InputError, match="random-rows"):
        worth.draw_random(eligible, 1000, 0)


def test_every_seed_is_finished_before_the_next():
    jobs = worth.jobs_of(["random", "id"], 2)
    assert jobs == [("none", 0), ("random", 0), ("id", 0), ("random", 1), ("id", 1)]


def test_a_result_with_other_settings_is_refused(tmp_path: Path):
    path = tmp_path / "id-seed0.json"
    assert not worth.is_done(path, {"rank": 8})
    common.write_json(path, {"settings": {"rank": 8}})
    assert worth.is_done(path, {"rank": 8})
    with pytest.raises(InputError, match="rank=8, not 4"):
        worth.is_done(path, {"rank": 4})


def test_the_in2core_experiment_from_its_command_line(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One seed on the tiny pool, whole: every table is there, and a second call does nothing."""
    out = tmp_path / "out"
    arguments = {
        "out": out,
        "pool": setup.candidates[0],
        "rows": 40,
        "target": setup.targets["sums"]["path"],
        "test": setup.targets["mixed"]["path"],
        "test-limit": 4,
        "model": setup.model,
        "gguf-file": "",
        "max-length": 128,
        "seeds": 1,
        "threads": 1,
        "epochs": 1,
        "learning-rate": 0.02,
    }
    words = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    assert in2core_experiment.main(words) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    for arm in ("none", *in2core_experiment.ARMS):
        assert f"| {arm} |" in printed
    choice = json.loads((out / "layers.json").read_text())
    pool = [json.loads(line)["messages"] for line in (out / "pool.jsonl").read_text().splitlines()]
    distinct = len({json.dumps(messages) for messages in pool})
    assert len(pool) == 40
    assert choice["pilot"] == distinct, "the layer table is not of the whole pool"
    assert f"{distinct} rows, {choice['groups']} layers" in printed
    whole = [each for each in choice["table"] if each["groups"] == choice["groups"]]
    assert whole
    assert all(each["held_out"] == pytest.approx(1.0) for each in whole)
    results = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert in2core_experiment.main(words) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (out / "results").iterdir()} == results


def test_the_arms_of_the_in2core_experiment_are_of_one_size_and_of_scored_rows():
    scores = np.array([0.5, np.nan, -3.0, 2.0, 1.0, np.nan, -1.0, 0.1, -0.2])
    arms = in2core_experiment.arms_of(scores, np.array([4, 3]), seed=1)
    assert arms["best"].tolist() == [3, 4]
    assert arms["worst"].tolist() == [2, 6], "not the lowest influence"
    assert len(arms["random"]) == 2
    assert np.isfinite(scores[arms["random"]]).all()
    again = in2core_experiment.arms_of(scores, np.array([4, 3]), seed=1)
    assert arms["random"].tolist() == again["random"].tolist()
    draws = {
        tuple(in2core_experiment.arms_of(scores, np.array([4, 3]), seed=s)["random"])
        for s in range(20)
    }
    assert len(draws) > 5, "seeds share their random rows"


def test_perplexity_counts_tokens_and_coverage_is_held_against_the_loss():
    rows = [
        {"mass": 3.0, "effective": 2.0, "proponents": 4, "nearest": 0.1, "nearest_mean": 0.4},
        {"mass": 2.0, "effective": 3.0, "proponents": 5, "nearest": 0.3, "nearest_mean": 0.3},
        {"mass": 1.0, "effective": 1.0, "proponents": 6, "nearest": 0.2, "nearest_mean": 0.2},
    ]
    test = {"losses": [1.0, 2.0], "response_tokens": [3, 1]}
    before = {"tests": {"test": test, "target": {"losses": [2.0, 2.0, 2.5]}}}
    after = {"tests": {"test": test, "target": {"losses": [1.0, 1.5, 2.4]}}}
    assert in2core_report.perplexity(before) == pytest.approx(np.exp(5 / 4))
    table = in2core_report.coverage_table({"none": {0: before}, "full": {0: after}}, {0: rows})
    lines = {line.split("|")[1].strip(): line.split("|")[2:6] for line in table.splitlines()}
    assert lines["mass"][1].strip() == "-1.000", "much mass, low loss"
    assert lines["mass"][3].strip() == "1.000", "and a large fall"
    assert lines["nearest_mean"][1].strip() == "-1.000"


def test_a_judge_is_as_it_was_after_every_choice_and_a_seed_fixes_the_run():
    rows, tests = encoded((9, 14, 6)), {"same": encoded((9, 14, 6))}
    judge = lora_training.Judge(tiny_model("llama", torch.float32), lambda _examples: [])
    recipe = lora_training.Recipe(learning_rate=0.01, batch_size=2, token_budget=20)
    untrained = lora_training.losses_of(judge, tests, recipe)[0]["same"]
    results = []
    for seed in (1, 2, 1):
        trained, (losses, _) = lora_training.train_and_test(
            judge, rows, np.ones(3), recipe, seed, tests
        )
        results.append(losses["same"])
        left = lora_training.losses_of(judge, tests, recipe)[0]["same"]
        assert left == untrained, "adapter is left"
        first, second = trained["epoch_losses"]
        assert first == pytest.approx(np.mean(untrained), rel=0.1)
        assert second < first
        assert trained["steps"] == 4
    assert results[0] == results[2], "a seed must fix the whole run"
    assert results[0] != results[1]
    assert np.mean(results[0]) < np.mean(untrained)


def test_sketch_sides_passes_against_one_backward_a_row():
    model = tiny_model("llama", torch.float32)
    replica: Any = SimpleNamespace(model=model)
    layers = attributed_layers(model, "linear")
    rows, goals = encoded((9, 14, 6, 11)), encoded((7, 12), seed=1)
    flat = []
    for row in [*rows, *goals]:
        weights = [layer.parameter for layer in layers]
        parts = torch.autograd.grad(row_loss(model, row), weights)
        flat.append(torch.cat([part.flatten() for part in parts]).double())
    truth = torch.stack(flat[:4]) @ torch.stack(flat[4:]).T
    exact = sketch_sides.product_pass(replica, layers, rows, goals, 20)
    np.testing.assert_allclose(exact["products"], truth, rtol=1e-4, atol=1e-6)

    # As many directions as features on each side and room for all: the sketch is the identity.
    shapes = layer_shapes(layers)
    whole = {"200": make_kronecker(shapes, side=200, dim=1_000_000, seed=0)}
    left, right = (sketch_sides.sketch_pass(replica, layers, r, whole, 20) for r in (rows, goals))
    norms = torch.stack(flat).norm(dim=1)
    np.testing.assert_allclose(np.append(left["norm"], right["norm"]), norms, rtol=1e-5, atol=0)
    groups = ["a", "b"]
    found = sketch_sides.compare(left, right, exact["products"], groups, [200], 2)
    for name, row in found["200"]["scores"].items():
        assert row["error_sd"] < 1e-6, f"{name}: rows in another order than the products?"
        assert row["recall"] == 1.0


def test_sketch_sides_claims_hold_for_independent_noise():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(4000, 2))
    halves = truth + generator.normal(0, 0.7, size=(2, 4000, 2))
    found = sketch_sides.judge(truth, halves, 200)
    assert found["claimed_sd"] == pytest.approx(found["error_sd"], rel=0.05)
    assert found["claimed_spearman"] == pytest.approx(found["spearman"], abs=0.02)


def test_true_fidelity_against_plain_loops(tmp_path: Path):
    run, exact = (write_run(tmp_path / name, names=("gsm8k",)) for name in ("id", "exact"))
    table = true_fidelity.read_scores(str(exact))
    noisy = true_fidelity.floats(table, "score.gsm8k")
    noisy = noisy + np.random.default_rng(0).normal(0, 0.3 * np.nanstd(noisy), len(noisy))
    where = table.schema.get_field_index("score.gsm8k")
    column = pa.array(noisy, pa.float64(), mask=np.isnan(noisy))
    changed = table.set_column(where, table.schema.field(where), column)
    for part in (exact / "scores").glob("*.parquet"):
        part.unlink()
    pq.write_table(changed, exact / "scores" / "part-00000.parquet")

    found = true_fidelity.compare(str(run), str(exact), 0.1)
    scores = true_fidelity.read_scores(str(run)).to_pylist()
    pairs = [
        (row, value)
        for row, value in zip(scores, noisy.tolist(), strict=True)
        if row["score"] is not None
    ]
    rest = [(row, value) for row, value in pairs if not row["exact"]]
    assert 0 < len(rest) < len(pairs) < len(scores)
    result = found["targets"]["gsm8k"]
    values = np.array([row["score.gsm8k"] for row, _ in rest])
    actual = np.array([value for _, value in rest])
    assert result["spearman_rest"] == pytest.approx(spearman(values, actual))
    hits = [row["low.gsm8k"] <= value <= row["high.gsm8k"] for row, value in rest]
    assert result["coverage_rest"] == pytest.approx(sum(hits) / len(hits))
    k = round(0.1 * len(pairs))
    best = sorted(range(len(pairs)), key=lambda i: -pairs[i][0]["score.gsm8k"])[:k]
    wanted = sorted(range(len(pairs)), key=lambda i: -pairs[i][1])[:k]
    assert result["recall"] == pytest.approx(len(set(best) & set(wanted)) / k)
    claim = json.loads((run / "fidelity.json").read_text())["targets"]["gsm8k"]["spearman"]
    assert result["spearman_inside"] == (claim["low"] <= result["spearman_rest"] <= claim["high"])


def test_true_fidelity_refuses_runs_over_other_pools(tmp_path: Path):
    run, other = write_run(tmp_path / "a", rows=400), write_run(tmp_path / "b", rows=300)
    with pytest.raises(InputError, match="other ids"):
        true_fidelity.compare(str(run), str(other))


def test_differences_of_one_seed_have_no_interval() -> None:
    of_worth = {n: {0: {"tests": {"t": {"losses": [i, i]}}}} for i, n in enumerate(("random", "a"))}
    (line,) = worth_report.difference_table(of_worth, ["t"]).splitlines()[2:]
    assert line.split("|")[1:6] == [" a ", " random ", " 1 ", " +1.0000 ", "  "], "nan is shown"
