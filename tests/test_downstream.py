"""`evaluation.downstream`: against training by hand; shared, resumed, refused; its statistics."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import Setup, conversation, scores_of, selection_of, tiny_config

from influence.candidates import read_examples, scan_files
from influence.config import Config
from influence.finetune import adapted, finetune
from influence.finetune_job import settings_of
from influence.held_out import row_losses
from influence.one_process import run_evaluate
from influence.replica import load_replica, load_tokenizer
from influence.tokenization import make_encoder
from influence.training_data import TrainingRows

RECIPE = {"rank": 2, "epochs": 1, "batch_size": 4, "learning_rate": 0.02}
METHODS: dict[str, Any] = {"own": {}, "rds": {"method": "rds"}}
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def tests_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Held-out rows of both targets; of `mixed` one has no response."""
    folder, paths = tmp_path_factory.mktemp("tests"), {}
    for name, rows in (("sums", 4), ("mixed", 3)):
        draw = random.Random(f"test {name}")
        lines: list[Any] = [{"messages": conversation(draw)} for _ in range(rows)]
        if name == "mixed":
            lines.insert(1, {"messages": [{"role": "user", "content": "no answer"}]})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[name] = str(path)
    return paths


def downstream_config(
    setup: Setup, tests: dict[str, str], run: Path | str, **changes: Any
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
    """Positions of a run's selected rows, found by their ids."""
    ids = scores_of(run).column("id").to_pylist()
    chosen = {row["id"] for row in selection_of(run) if row.get("id")}
    weight = scores_of(run).column("weight").to_pylist()
    found = [i for i, w in enumerate(weight) if w]
    assert chosen <= {ids[i] for i in found}
    return found


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
