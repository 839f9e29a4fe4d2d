"""What evaluations have in common that hold methods' scores against retraining on a small pool.

Some rows of the pool are drawn; each method scores them in a select run of its own below
RUN/evaluations/EVALUATION/NAME, over the run's cache; and the model is trained on parts of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from influence import storage
from influence.candidates import SourceFile
from influence.config import Config
from influence.config_checks import check_together
from influence.config_loading import parse_config
from influence.config_retraining import HeldOutTest, RetrainingConfig
from influence.errors import InputError
from influence.evaluations.own_run import (
    OwnReduce,
    kept_sections,
    load_catalogue,
    recipe_of,
    with_changes,
)
from influence.job import Job
from influence.retraining import (
    Tested,
    Training,
    plain_model,
    read_losses,
    retraining_units,
    run_retrainings,
    scan_tests,
)
from influence.transfer import rows_at, scores_at
from influence.usable_rows import check_tests

#: Sections of a config that the small pool's own run is of, beside fine-tuning.
_KEPT = ("model", "data", "targets", "replicas", "seed", "prices")
#: What a method cannot change: then its scores would be of something else.
_FIXED = ("run", "cache", "targets", "evaluation", "finetune", "data.candidates", "data.limit")
POOL, ROW = "pool.jsonl", "row"


class SmallPoolReduce(OwnReduce):
    """Draws the small pool; the trainings' rows are written by `OwnReduce`."""

    def draw_rows(self, count: int | None) -> Int[np.ndarray, " n"]:
        """After `load_catalogue`: positions of random rows that can be scored, increasing.

        Raises:
            InputError: fewer than 8 of them.
        """
        pool, config = self.reducer.pool, self.reducer.config
        assert pool is not None
        rows = pool.eligible
        if count is not None and count < len(rows):
            drawn = np.random.default_rng([config.seed, 0x5A11]).permutation(len(rows))[:count]
            rows = rows[np.sort(drawn)]
        if len(rows) < 8:
            raise InputError(f"{len(rows)} rows can be trained on; expected 8 at least")
        return rows


def section_of(config: Config, name: str) -> Any:
    """The evaluation's section."""
    section = getattr(config.evaluation, name)
    assert section is not None
    return section


def rows_drawn(config: Config, name: str, counts: Mapping[str, Any]) -> int:
    """Rows of the small pool, by the counts of the whole one."""
    asked, scored = section_of(config, name).rows, int(counts["scored"])
    return scored if asked is None else min(asked, scored)


def own_settings(config: Config, name: str, budget: str, *, per_row: bool = False) -> Config:
    """The config of the evaluation's own run: model and pool, and each method's whole config.

    Raises:
        InputError: names evaluation.NAME.methods.METHOD and the key in it.
    """
    section: RetrainingConfig = section_of(config, name)
    key, run = f"evaluation.{name}", storage.join(config.run, "evaluations", name)
    methods = section.methods or {config.method: {}}
    made = {
        method: method_config(config, f"{key}.methods.{method}", run, changes, budget, per_row)
        for method, changes in methods.items()
    }
    asked = section.model_dump(exclude_unset=True, mode="json", exclude={"finetune"})
    whole = {m: each.model_dump(exclude_unset=True, mode="json") for m, each in made.items()}
    own = Config.model_validate(
        {
            **kept_sections(config, _KEPT),
            "run": run,
            "cache": config.cache_url,
            "method": "random",
            "finetune": recipe_of(section.finetune, config, key),
            "evaluation": {name: {**asked, "methods": whole}},
        }
    )
    check_together(own, key)
    unknown = [target for target in section.tests or {} if target not in config.targets]
    if unknown:
        raise InputError(
            f"{key}.tests.{unknown[0]}: no such target; expected {', '.join(config.targets)}"
        )
    return plain_model(own)


def method_config(
    config: Config, key: str, run: str, changes: Mapping[str, Any], budget: str, per_row: bool
) -> Config:
    """A method's select run on the small pool; `key` is what errors call it.

    With `per_row`, every target whose score is a mean over rows has a second one, T.rows, with a
    score for each row.

    Raises:
        InputError: a change that the method cannot make, or that is none of a config.
    """
    for fixed in _FIXED:
        first, _, rest = fixed.partition(".")
        value = changes.get(first)
        if value is not None and (not rest or (isinstance(value, dict) and rest in value)):
            raise InputError(f"{key}.{fixed}: methods are compared on the same; leave it out")
    given = config.model_dump(exclude_unset=True, mode="json")
    whole = with_changes({k: v for k, v in given.items() if k != "evaluation"}, changes)
    for name in ("transfer", "coverage"):
        whole.pop(name, None)  # they come after the scores
    targets = dict(given["targets"])
    if per_row and (whole.get("weights") or {}).get("order", 1) == 1:
        for name in config.targets:
            if rows_of(name) in config.targets:
                raise InputError(f"targets.{rows_of(name)}: {key} needs this name; take another")
            path = storage.join(run, "targets", f"{name}.jsonl")
            targets[rows_of(name)] = {"path": path, "group_by": ROW}
    whole |= {
        "run": storage.join(run, key.rsplit(".methods.", 1)[1]),
        "cache": config.cache_url,
        "data": {**whole["data"], "candidates": [storage.join(run, POOL)], "limit": None},
        "targets": targets,
        "selection": {
            **whole.get("selection", {}),
            "budget": (changes.get("selection") or {}).get("budget", budget),
            "per_source": {},
        },
    }
    return parse_config(whole, name=key)


def rows_of(target: str) -> str:
    """The name of the second target that has a score for each row of a target."""
    return f"{target}.rows"


def read_tests(config: Config, name: str) -> dict[str, Tested]:
    """The tests of every target: those that are named, else its own rows.

    Raises:
        InputError: files that are not there, or without a row that has a loss.
    """
    section: RetrainingConfig = section_of(config, name)
    named = section.tests
    key = "targets" if named is None else f"evaluation.{name}.tests"
    chosen: Mapping[str, Any] = config.targets if named is None else named
    tests = {
        target: HeldOutTest(path=each.path, limit=each.limit)  # pyright: ignore[reportCallIssue]
        for target, each in chosen.items()
    }
    return check_tests(config, key, scan_tests(key, tests))


def draw_pool(job: Job, reduce: Any, name: str) -> Int[np.ndarray, " n"]:
    """Tokenise, draw the small pool, and write it, and the targets row by row, for the methods.

    Returns positions in the catalogue of the whole pool, increasing.

    Raises:
        InputError: too few rows.
    """
    load_catalogue(job, reduce)
    drawn = reduce.draw_rows(section_of(job.config, name).rows)
    run = job.config.run
    _write(storage.join(run, POOL), rows_at(job.files, drawn))
    for target, files in job.target_files.items():
        rows = _all_rows(files)
        for row in rows:
            row[ROW] = row_label(int(row["id"]))
        _write(storage.join(run, "targets", f"{target}.jsonl"), rows)
    return drawn


def row_label(position: int) -> str:
    """The group that a target's row is, by its position in the target."""
    return f"{position:06d}"


def method_scores(job: Job, name: str, rows: int) -> dict[str, dict[str, Float[np.ndarray, " n"]]]:
    """Every method's scores of the small pool by target and group; NaN for a row without.

    Raises:
        InputError: of a method's run; names the method.
        ShardsFailedError: some shards of one failed for good; everything else is committed.
    """
    if job.select_run is None:
        raise RuntimeError("methods to run, but nothing that runs them: set job.select_run")
    found = {}
    for method, whole in section_of(job.config, name).methods.items():
        key = f"evaluation.{name}.methods.{method}"
        own = parse_config(whole, name=key)
        job.progress.note(f"{name}: scores of {method} ...")
        try:
            job.select_run(own)
        except InputError as error:
            raise type(error)(f"{key}: {error}") from error
        found[method] = scores_at(own.run, np.arange(rows))
    return found


def trained_losses(
    job: Job, reduce: Any, parts: Sequence[tuple[Any, Any, str]], seeds: Sequence[int], tests: Any
) -> dict[str, Float[np.ndarray, "seeds p t"]]:
    """Test losses after a training on every part (positions, weights or None, what messages call
    it), with every seed.

    Raises:
        ShardsFailedError: some units failed for good; everything else is committed.
    """
    trainings = [
        Training(rows, weights, seed, f"{label}, seed {seed}")
        for seed in seeds
        for rows, weights, label in parts
    ]
    units = retraining_units(job, reduce, trainings, tests)
    run_retrainings(job, units)
    read = read_losses(job.cache, units)
    return {name: read[name].reshape(len(seeds), len(parts), -1) for name in tests}


def _all_rows(files: Sequence[SourceFile]) -> list[dict[str, Any]]:
    return rows_at(files, np.arange(sum(file.rows for file in files)))


def _write(url: str, rows: Sequence[Mapping[str, Any]]) -> None:
    storage.put(url, "".join(json.dumps(row) + "\n" for row in rows).encode())
