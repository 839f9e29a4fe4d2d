"""Evaluation `downstream`: fine-tune on every method's selection, and compare the test losses.

One selection for each target and method, each a select run of its own over the shared cache; then
every (selection, seed) is a retraining, and all of them are one batch of units: whatever is there,
of this evaluation or another, is not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from influence import storage
from influence.config import Config
from influence.config_downstream import FULL, RANDOM, UNTRAINED
from influence.errors import InputError, ShardsFailedError
from influence.evaluations import downstream_arms as arms
from influence.evaluations.downstream_arms import KEY, NAME, Selected
from influence.evaluations.downstream_document import Key, Made, document, names_in, section_of
from influence.evaluations.downstream_shown import plots, table
from influence.evaluations.kind import Evaluation, Trainings
from influence.evaluations.own_run import OwnReduce, kept_sections, load_catalogue, recipe_of
from influence.job import Job, timed
from influence.load import Load
from influence.result_bytes import selected_rows
from influence.retraining import (
    Tested,
    Training,
    plain_model,
    retraining_units,
    run_retrainings,
    scan_tests,
)
from influence.unit_loads import load_of
from influence.usable_rows import check_tests

_KEPT = ("model", "data", "targets", "replicas", "prices", "seed")


class DownstreamReduce(OwnReduce):
    """The select job's catalogue, and what trainings on rows of it take."""

    def row_loads(
        self, rows: Sequence[Int[np.ndarray, " r"]], max_length: int | None
    ) -> list[Load]:
        """What one pass over each list of rows takes."""
        pool = self.reducer.pool
        assert pool is not None
        return [load_of(pool, np.asarray(each, dtype=np.int64), max_length) for each in rows]


def settings(config: Config) -> Config:
    """A run on the plain model; all that decides a loss is in its section, for a change to be seen.

    Raises:
        InputError: a target without a test, or a method whose config is none.
    """
    section = config.evaluation.downstream
    assert section is not None
    for name in config.targets:
        if name not in section.tests:
            raise InputError(
                f"{KEY}.tests.{name}: is missing; expected held-out rows of the target"
            )
    for name in section.tests:
        if name not in config.targets:
            known = ", ".join(config.targets)
            raise InputError(f"{KEY}.tests.{name}: is no target; expected one of: {known}")
    recipe = recipe_of(section.finetune, config, KEY)
    own = {**section.model_dump(mode="json"), "finetune": recipe}
    own["seeds"] = len(arms.seeds_of(config))
    own["methods"] = arms.whole_methods(config)
    asked = Config.model_validate(
        {
            **kept_sections(config, _KEPT),
            "run": storage.join(config.run, "evaluations", NAME),
            "cache": config.cache_url,
            "method": RANDOM,
            "finetune": recipe,
            "evaluation": {NAME: own},
        }
    )
    arms.arms_of(asked)
    return plain_model(asked)


def inputs(config: Config) -> dict[str, Tested]:
    """The tests' files.

    Raises:
        InputError: files that are not there, or without a row that has a loss.
    """
    key = f"{KEY}.tests"
    return check_tests(config, key, scan_tests(key, section_of(config).tests))


def run(job: Job, reduce: Any, tests: dict[str, Tested]) -> dict[str, Any]:
    """Make the selections, train and test on every one, and compare.

    Raises:
        ShardsFailedError: a training failed for good (all others are committed).
        InfluenceError: a selection failed; names all that did.
    """
    selected = arms.run_arms(job)
    failed = selected.failed
    load_catalogue(job, reduce)
    made = _trainings(job, reduce, tests, selected)
    try:
        run_retrainings(job, [unit for each in made.values() for unit in each.units])
    except ShardsFailedError as error:
        text = f"{error}\n{arms.failure(failed)}" if failed else str(error)
        raise ShardsFailedError(text) from None
    if failed:
        raise arms.failure(failed)
    with timed(job, "comparing"):
        return document(job, reduce, tests, selected, made).model_dump(mode="json")


def _trainings(
    job: Job, reduce: Any, tests: Mapping[str, Tested], selected: Selected
) -> dict[Key, Made]:
    """Every training with its unit, by target and name; of failed selections none."""
    asked: dict[Key, list[Training]] = {}
    for target in job.config.targets:
        for name in names_in(job):
            if name == UNTRAINED:
                asked[target, name] = [Training([], label="the untrained model")]
                continue
            found = [_training(job, selected, target, name, s) for s in arms.seeds_of(job.config)]
            there = [training for training in found if training is not None]
            if len(there) == len(found):
                asked[target, name] = there
    flat = [training for each in asked.values() for training in each]
    units = iter(retraining_units(job, reduce, flat, tests))
    return {key: Made(each, [next(units) for _ in each]) for key, each in asked.items()}


def _training(job: Job, selected: Selected, target: str, name: str, seed: int) -> Training | None:
    """On a selection, or on all rows that the baseline chose from; None if that one failed."""
    section, rows = section_of(job.config), sum(file.rows for file in job.files)
    chosen = selected.of(target, section.baseline if name == FULL else name, seed)
    if chosen is None:
        return None
    if chosen.of != rows:
        raise InputError(
            f"{KEY}: the selection {target}/{name} is of {chosen.of:,} rows, the pool has "
            f"{rows:,}; run the same command again with --replace"
        )
    if name == FULL:
        assert chosen.scored is not None
        return Training(chosen.scored, None, seed, f"the whole pool, seed {seed}")
    weights = chosen.weights if section.weighted else None
    return Training(chosen.rows, weights, seed, f"{target}/{name}, seed {seed}")


def trainings(config: Config, counts: Mapping[str, Any]) -> list[Trainings]:
    """By the evaluation's own config: the untrained model, and every selection with every seed."""
    seeds, found = len(arms.seeds_of(config)), {}
    for arm in arms.arms_of(config):
        rows = selected_rows(arm.config.selection.budget, counts)
        # A draw that every training has anew is the same one for every target.
        drawn = arm.seed is not None
        found[arm.name, arm.seed if drawn else arm.target] = Trainings(1 if drawn else seeds, rows)
    full = [Trainings(seeds, counts["scored"])] if section_of(config).full else []
    return [Trainings(1, 0), *found.values(), *full]


EVALUATION = Evaluation(
    settings,
    inputs,
    DownstreamReduce,
    run,
    table,
    plots=plots,
    trainings=trainings,
    as_written=True,
)
