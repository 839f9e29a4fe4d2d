"""Retrainings as units: against training by hand; shared, resumed, and leaving no trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in2core_runs import Cut
from retraining_oracle import RECIPE, Prepared, prepared, trained_by_hand
from tiny_run import Setup, shards_in

from influence.cache import Cache
from influence.candidates import read_examples
from influence.errors import ShardsFailedError
from influence.finetune_job import settings_of
from influence.held_out import row_losses
from influence.replica import load_replica, load_tokenizer
from influence.retraining import (
    STAGE,
    Training,
    plain_model,
    read_facts,
    run_retrainings,
)
from influence.retraining_rows import rows_of, runs_of
from influence.retraining_work import Measured, retrain
from influence.tokenization import make_encoder
from influence.training_data import TrainingRows
from influence.units import Bundle

#: Rows that can be trained on; 17 is a duplicate, 49 malformed.
ROWS = [40, 3, 8, 21, 17, 5, 60]


@pytest.fixture(scope="module")
def made(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(setup, tmp_path_factory.mktemp("made") / "run")


@pytest.mark.parametrize("weights", [None, [1.0, 2, 0.5, 1, 3, 1, 1]])
def test_a_unit_gives_the_losses_of_a_training_by_hand(
    made: Prepared, tmp_path: Path, weights: list[float] | None
) -> None:
    training = Training(ROWS, None if weights is None else np.array(weights), seed=5)
    found = made.losses([training])
    tests = {name: test.files for name, test in made.tests.items()}
    expected = trained_by_hand(made.config, made.job.files, tests, training, tmp_path)
    for name, losses in expected.items():
        assert found[name][0].tolist() == losses, f"{name}: other rows, order, weights or seed"


def test_without_rows_it_is_the_model_as_it_is(made: Prepared) -> None:
    config = made.config
    model = load_replica(config.model, "float32", "cpu").model
    encode = make_encoder(load_tokenizer(config.model), config.data.max_length)
    found = made.losses([Training([], seed=0), Training([], seed=1)])
    for name, test in made.tests.items():
        rows = [row for f in test.files for row in encode(read_examples(f, 0, f.rows - 1))]
        losses = row_losses(model, rows, config.replicas.token_budget)
        assert found[name].tolist() == [losses, losses], "the untrained model has no seed"
    trained = made.losses([Training(ROWS)])
    assert all((trained[name] != found[name][:1]).any() for name in trained)


def test_order_of_units_replicas_and_neighbours_change_no_bit(
    setup: Setup, made: Prepared, tmp_path: Path
) -> None:
    trainings = [Training(ROWS, seed=1), Training(ROWS[::-1], seed=1), Training(ROWS[:4], seed=2)]
    found = made.losses(trainings)
    again = prepared(setup, tmp_path / "run").losses([*trainings[::-1], Training([1, 2])])
    for name, losses in found.items():
        assert (again[name][2::-1] == losses).all(), f"{name}: a unit depends on those before it"
    assert (found["sums"][0] != found["sums"][1]).any(), "the order of the rows is lost"


def test_the_model_is_bitwise_as_before(made: Prepared) -> None:
    worker_model = load_replica(made.config.model, "float32", "cpu").model
    before = copy.deepcopy(worker_model.state_dict())
    names = [name for name, _ in worker_model.named_modules()]
    encode = make_encoder(load_tokenizer(made.config.model), made.config.data.max_length)
    rows = encode(read_examples(made.job.files[0], 0, 5))

    def measure() -> dict[str, Measured]:
        assert [name for name, _ in worker_model.named_modules()] != names
        return {"t": Measured(row_losses(worker_model, rows, 512))}

    retrain(worker_model, TrainingRows.of(rows), measure, settings_of(made.config))
    after = worker_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [name for name, _ in worker_model.named_modules()] == names, "factors are left in it"
    assert not worker_model.training


def test_the_shard_is_found_by_contents_alone(setup: Setup, made: Prepared, tmp_path: Path) -> None:
    """Copies of the files elsewhere share every shard; other contents none."""
    pool, targets = tmp_path / "elsewhere", {}
    pool.mkdir()
    for file in made.job.files:
        (pool / Path(file.url).name).write_bytes(Path(file.url).read_bytes())
    for name, each in setup.targets.items():
        path = tmp_path / f"{name}-copy.jsonl"
        path.write_bytes(Path(each["path"]).read_bytes())
        targets[name] = {**each, "path": str(path)}
    moved = Setup(setup.model, tmp_path, [str(pool / "*")], targets)
    trainings = [Training(ROWS), Training([])]
    there = [unit.key for unit in made.units(trainings)]
    other = prepared(moved, tmp_path / "run")
    assert [unit.key for unit in other.units(trainings)] == there, "a path is in the fingerprint"
    equal = Training(ROWS, np.full(len(ROWS), 3.0))
    assert made.units([equal])[0].key == there[0], "equal weights are no other training"
    # Row 17 holds the very messages of row 3.
    same = [3 if row == 17 else row for row in ROWS]
    assert made.units([Training(same)])[0].key == there[0]
    others = [
        Training(ROWS, seed=1),
        Training(ROWS[::-1]),
        Training(ROWS[1:]),
        Training(ROWS, np.arange(1.0, 8)),
    ]
    assert len({unit.key for unit in made.units(others)} | {there[0]}) == 5
    lines = Path(targets["sums"]["path"]).read_text().splitlines()
    Path(targets["sums"]["path"]).write_text("\n".join(lines[1:]))
    changed = prepared(moved, tmp_path / "changed").units(trainings)
    assert not {unit.key for unit in changed} & set(there), "the tests' rows do not count"
    rate = prepared(setup, tmp_path / "rate", finetune={**RECIPE, "learning_rate": 0.01})
    keys = [unit.key for unit in rate.units(trainings)]
    assert keys[0] != there[0]
    assert keys[1] == there[1], "the untrained model has no settings"
    budget = prepared(setup, tmp_path / "budget", finetune={**RECIPE, "token_budget": 64})
    assert [unit.key for unit in budget.units(trainings)] == there


def test_one_that_was_cut_short_goes_on_with_the_missing_ones(
    setup: Setup, made: Prepared, tmp_path: Path
) -> None:
    trainings = [Training(ROWS, seed=seed) for seed in range(4)]
    expected = made.losses(trainings)
    cut = prepared(setup, tmp_path / "run", after=2)
    with pytest.raises(Cut):
        cut.losses(trainings)
    there = {key for key in shards_in(cut.config.cache_url) if key.startswith(STAGE)}
    assert len(there) == 2
    again = prepared(setup, tmp_path / "run")
    found = again.losses(trainings)
    record = again.job.log.manifest.stages[STAGE]
    assert (record.reused, record.computed) == (2, 2)
    assert all((found[name] == expected[name]).all() for name in expected)


def test_the_longest_is_handed_out_first(made: Prepared) -> None:
    """Or else one that takes long begins when all others are done, beside idle replicas."""
    sizes = [2, 7, 1, 4]
    units = made.units([Training(range(20, 20 + size), seed=5) for size in sizes])
    encode = make_encoder(load_tokenizer(made.config.model), made.config.data.max_length)
    rows = encode(read_examples(made.job.files[0], 20, 26))
    assert [unit.tokens for unit in units] == [sum(r.n_tokens for r in rows[:s]) for s in sizes]
    handed: list[int] = []

    def execute(bundles: Sequence[Bundle], done: Any, failed: Any) -> None:
        handed.extend(units.index(unit) for bundle in bundles for unit in bundle.units)

    run_retrainings(replace(made.job, execute=execute), units)
    assert [sizes[i] for i in handed] == sorted(sizes, reverse=True)


def test_a_training_has_the_time_of_as_many_shards_as_it_has_rows(made: Prepared) -> None:
    """Else one on the whole pool is taken for stuck, and begun again."""
    sizes = [2, 32]  # at a seed of their own: what another test has trained is not handed out
    units = made.units([Training(range(20, 20 + size), seed=17) for size in sizes])
    tested, each = sum(test.rows for test in made.tests.values()), 8
    assert made.config.replicas.gradient_rows_per_shard == each
    expected = [-(-int(size * 1.5 + tested) // each) for size in sizes]
    bundles: list[Bundle] = []

    def execute(given: Sequence[Bundle], done: Any, failed: Any) -> None:
        bundles.extend(given)

    run_retrainings(replace(made.job, execute=execute), units)
    assert sorted(bundle.shards for bundle in bundles) == expected


def test_a_training_that_diverges_is_named_and_the_others_are_made(
    setup: Setup, tmp_path: Path
) -> None:
    recipe = {**RECIPE, "learning_rate": 1e30}
    made = prepared(setup, tmp_path / "run", finetune=recipe)
    trainings = [Training(ROWS, seed=4, label="sums/own, seed 4"), Training(ROWS, seed=5)]
    units = made.units([*trainings, Training([])])
    with pytest.raises(ShardsFailedError) as caught:
        run_retrainings(made.job, units)
    text = str(caught.value)
    assert "2 shard(s) failed for good" in text, "one that diverges ends the job"
    assert "  sums/own, seed 4 (1 attempt): finetune: the loss of step " in text
    assert "  a training on 7 rows, seed 5 (1 attempt): " in text
    assert str(setup.folder) not in text, "a test file is blamed for a training"
    record = made.job.log.manifest.stages[STAGE]
    assert record.computed == 1, "the last one, longest first, is the model as it is"
    assert [failed.label for failed in record.failed] == ["sums/own, seed 4", units[1].label]


def test_what_was_trained_is_told(made: Prepared) -> None:
    """Row 49 is malformed: it is left out, counted, and the others are trained on."""
    units = made.units([Training([*ROWS, 49]), Training([])])
    run_retrainings(made.job, units)
    trained, untrained = read_facts(Cache(made.config.cache_url), units)
    assert trained["rows"] == len(ROWS)
    assert sum(trained["left_out"].values()) == 1
    assert trained["steps"] == 3
    assert trained["tokens"] > 0
    assert trained["seconds"] > 0
    assert trained["device"] == "cpu"
    assert untrained["steps"] == untrained["tokens"] == 0
    assert any("left out of a training" in n for n in made.job.log.manifest.stages[STAGE].notes)


def test_a_test_row_without_a_response_has_no_loss(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    lines = Path(setup.targets["sums"]["path"]).read_text().splitlines()
    empty = json.dumps({"messages": [{"role": "user", "content": "no answer"}]})
    path.write_text("\n".join([lines[0], empty, lines[1]]))
    odd = Setup(setup.model, tmp_path, setup.candidates, {"odd": {"path": str(path)}})
    made = prepared(odd, tmp_path / "run")
    assert np.isnan(made.losses([Training([])])["odd"][0]).tolist() == [False, True, False]
    notes = made.job.log.manifest.stages[STAGE].notes
    assert any("odd: 1 of 3 rows have no loss" in note for note in notes)


@pytest.mark.parametrize(
    "rows", [[], [4], [0, 1, 2], [5, 4, 3], [1, 1, 2], [7, 8, 9, 2, 3, 20], list(range(50))]
)
def test_runs_hold_any_list_of_rows(rows: list[int]) -> None:
    runs = runs_of(np.array(rows, dtype=np.int64))
    assert rows_of(runs).tolist() == rows
    assert runs[1].sum() == len(rows)


def test_all_rows_but_one_are_two_runs() -> None:
    assert runs_of(np.delete(np.arange(100_000), 777)).tolist() == [[0, 778], [777, 99_222]]


@pytest.mark.parametrize(
    "training", [Training([72]), Training([-1]), Training([1], np.array([-1]))]
)
def test_rows_and_weights_that_are_none_are_refused(made: Prepared, training: Training) -> None:
    with pytest.raises(ValueError, match="expected"):
        made.units([training])


def test_training_goes_on_from_the_models_own_adapter(
    setup: Setup, adapter: str, tmp_path: Path
) -> None:
    """Whether the adapter is the model's or fine-tuning's: the same units, the same losses."""
    training = Training(ROWS, seed=2)
    as_is = prepared(setup, tmp_path / "run", model__adapter=adapter)
    plain = plain_model(as_is.config)
    assert (plain.model.adapter, plain.finetune.adapter) == (None, adapter)
    moved = prepared(setup, tmp_path / "moved", finetune={**RECIPE, "adapter": adapter})
    trainings = [training, Training([])]
    keys = [unit.key for unit in as_is.units(trainings)]
    assert [unit.key for unit in moved.units(trainings)] == keys
    found, other = as_is.losses(trainings), moved.losses(trainings)
    tests = {name: test.files for name, test in as_is.tests.items()}
    expected = trained_by_hand(moved.config, moved.job.files, tests, training, tmp_path, adapter)
    for name, losses in expected.items():
        assert (found[name] == other[name]).all()
        assert found[name][0].tolist() == losses, f"{name}: it began with other factors"
    bare = prepared(setup, tmp_path / "bare").losses([Training([])])
    assert (bare["sums"][0] != found["sums"][1]).all(), "the untrained model lacks its adapter"
