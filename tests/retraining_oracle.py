"""A job for retrainings; and training by hand, which is what a unit has to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from in2core_runs import cut_after
from tiny_run import Setup, tiny_config

from influence.cache import Cache
from influence.candidates import SourceFile, read_examples
from influence.config import Config
from influence.config_retraining import HeldOutTest
from influence.evaluations.own_run import OwnReduce, load_catalogue
from influence.finetune import adapted, finetune
from influence.finetune_job import settings_of
from influence.held_out import row_losses
from influence.job import Job
from influence.local import local_execute
from influence.pipeline import prepare
from influence.progress import Progress
from influence.replica import load_replica, load_tokenizer
from influence.retraining import (
    STAGE,
    Training,
    read_losses,
    retraining_units,
    run_retrainings,
    scan_tests,
)
from influence.tokenization import make_encoder
from influence.training_data import TrainingRows
from influence.units import Unit

RECIPE = {"rank": 2, "epochs": 1.5, "batch_size": 4, "learning_rate": 0.02}


@dataclass
class Prepared:
    """A job whose catalogue is known."""

    config: Config
    job: Job
    reduce: OwnReduce
    tests: dict[str, Any]

    def units(self, trainings: list[Training]) -> list[Unit]:
        return retraining_units(self.job, self.reduce, trainings, self.tests)

    def losses(self, trainings: list[Training]) -> dict[str, np.ndarray]:
        units = self.units(trainings)
        run_retrainings(self.job, units)
        return read_losses(Cache(self.config.cache_url), units)


def prepared(setup: Setup, run: Path | str, after: int | None = None, **changes: Any) -> Prepared:
    given = {"finetune": RECIPE, **changes}
    config = tiny_config(setup, run, **given)
    job = prepare(config, Progress(quiet=True))
    execute = local_execute(config, job.watch)
    job = replace(job, execute=execute)
    reduce = OwnReduce(config)
    load_catalogue(job, reduce)
    if after is not None:
        job = replace(job, execute=cut_after(execute, after, STAGE))
    tests = {n: HeldOutTest(path=each["path"]) for n, each in setup.targets.items()}  # pyright: ignore
    return Prepared(config, job, reduce, scan_tests("tests", tests))


def trained_by_hand(
    config: Config,
    files: Sequence[SourceFile],
    tests: Mapping[str, Sequence[SourceFile]],
    training: Training,
    folder: Path,
    adapter: str | None = None,
) -> dict[str, list[float]]:
    """A fresh model, `finetune` on the rows of the files, read one file at a time, `row_losses`."""
    model = load_replica(config.model, "float32", "cpu").model
    encode = make_encoder(load_tokenizer(config.model), config.data.max_length)
    pool = [row for f in files for row in encode(read_examples(f, 0, f.rows - 1))]
    asked = {
        name: [row for f in members for row in encode(read_examples(f, 0, f.rows - 1))]
        for name, members in tests.items()
    }
    settings = replace(settings_of(config), seed=training.seed)
    rows = TrainingRows.of([pool[i] for i in training.rows], training.weights)
    finetune(model, rows, {}, settings, str(folder / "adapter"), adapter=adapter)
    with adapted(model, settings, str(folder / "adapter")):
        model.eval()
        budget = settings.token_budget
        return {name: row_losses(model, each, budget) for name, each in asked.items()}
