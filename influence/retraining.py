"""Retrainings as units of work: train fresh LoRA factors on some rows, take the tests' losses.

Each is one shard of the cache, `retraining/FINGERPRINT/...`, found by the contents of everything
that changes the losses: rows, order, weights, model, template, settings, seed and tests, and never
by a path. So evaluations and runs share them, and one that was cut short makes those that are
missing. How they are computed is in `influence.retraining_work`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

from influence.array_files import write_arrays
from influence.cache import Cache, Shard
from influence.candidates import SourceFile
from influence.config import Config
from influence.config_retraining import HeldOutTest
from influence.exact_match import RULE
from influence.finetune_job import identity_of, settings_of
from influence.fingerprints import fingerprint
from influence.job import Job, run_units
from influence.pipeline import scan_named
from influence.retraining_rows import FOLDER, STAGE, Training
from influence.schemas import FORMAT_VERSION
from influence.score_shards import scoring_url
from influence.units import Unit

__all__ = ["STAGE", "Tested", "Training", "read_losses", "retraining_units", "run_retrainings"]

#: Of the settings, those that no loss of a retraining depends on, and the seed, which each has.
_BESIDE = ("evaluate_every", "seed")


@dataclass(frozen=True)
class Tested:
    """A named test: its rows, and whether answers are generated, too.

    Attributes:
        files: the rows, in order.
        exact_match: generate an answer to each row, and compare it with the row's.
        max_new_tokens: of an answer.
    """

    files: list[SourceFile]
    exact_match: bool = False
    max_new_tokens: int = 0

    @property
    def rows(self) -> int:
        """Number of rows, those without a loss among them."""
        return sum(file.rows for file in self.files)


def scan_tests(key: str, tests: Mapping[str, HeldOutTest]) -> dict[str, Tested]:
    """The files of some tests; `key` is the config's, which errors name.

    Raises:
        InputError: files that are not there.
    """
    return {
        name: Tested(
            scan_named(f"{key}.{name}.path", [test.path], test.limit),
            test.exact_match,
            test.max_new_tokens if test.exact_match else 0,
        )
        for name, test in tests.items()
    }


def plain_model(config: Config) -> Config:
    """The config whose replicas hold the very model that retrainings begin with, and no second one.

    An adapter that the model has goes to `finetune.adapter`, from where trainings go on; the dtype
    is that of fine-tuning.
    """
    model, section = config.model, config.finetune
    changed: dict[str, Any] = {"dtype": section.dtype or model.dtype}
    beside: dict[str, Any] = {}
    if model.adapter is not None and section.adapter is None and model.adapter_revision is None:
        changed["adapter"], beside["adapter"] = None, model.adapter
    return config.model_copy(
        update={
            "model": model.model_copy(update=changed),
            "finetune": section.model_copy(update=beside),
        }
    )


def training_seeds(config: Config, count: int) -> list[int]:
    """The seeds of trainings: that of fine-tuning, and the next ones."""
    first = settings_of(config).seed
    return [(first + step) % 2**32 for step in range(count)]


def retraining_units(
    job: Job, reduce: Any, trainings: Sequence[Training], tests: Mapping[str, Tested]
) -> list[Unit]:
    """One unit for each training, in their order; equal trainings have equal units.

    How is trained is said by the job's section `finetune`; of it, `seed` is each training's own.

    Args:
        job: knows its catalogue (`influence.evaluations.own_run.load_catalogue`).
        reduce: the job's reducer, with the step `write_trainings` (of `OwnReduce`).

    Raises:
        InputError: a dtype that is not to train in, or an adapter that is not there.
    """
    ordered = {name: tests[name] for name in sorted(tests)}
    settings = settings_of(job.config).that_count()
    for name in _BESIDE:
        del settings[name]
    values = {
        "format_version": FORMAT_VERSION,
        "template": job.fingerprints["catalogue"].values["template"],
        **identity_of(job.config),
        "tests": {name: _contents(test) for name, test in ordered.items()},
    }
    job.fingerprints[STAGE] = fingerprint({**values, **settings})
    url = scoring_url(job.config.run)
    asked = {name: asdict(test) for name, test in ordered.items()}
    key = write_arrays(url, FOLDER, {"tests": asked}, {})
    file = next(iter(ordered.values())).files[0]
    units = []
    for training, written in zip(trainings, reduce.write_trainings(trainings), strict=True):
        # Without rows nothing is trained, and no setting counts.
        own = {"rows": written.digest, "seed": training.seed, **settings} if written.digest else {}
        found = fingerprint({**values, **own})
        reads, tokens = (key, written.key), written.tokens
        label = training.label or f"a training on {len(training.rows):,} rows, seed {training.seed}"
        work = _shards(job.config, len(training.rows), ordered)
        units.append(
            Unit(STAGE, found.hex, file, 0, 0, needs=reads, tokens=tokens, label=label, shards=work)
        )
    return units


def _shards(config: Config, rows: int, tests: Mapping[str, Tested]) -> int:
    """How many gradient shards have as many rows as a training and its tests."""
    passed = rows * settings_of(config).epochs + sum(test.rows for test in tests.values())
    return max(1, ceil(passed / config.replicas.gradient_rows_per_shard))


def run_retrainings(job: Job, units: Sequence[Unit]) -> None:
    """Make those that the cache does not hold, the longest first: no replica is left with one.

    Raises:
        ShardsFailedError: one failed for good (all others are committed).
    """
    once = {unit.key: unit for unit in reversed(units)}.values()  # by its first label
    # The catalogue has no tokens of theirs: they are not about a range of rows.
    run_units(replace(job, tokens=None), sorted(once, key=lambda unit: (-unit.tokens, unit.key)))


def read_losses(cache: Cache, units: Sequence[Unit]) -> dict[str, Float[np.ndarray, "u t"]]:
    """Mean response loss (nats per token) of every test's rows after each training.

    A row without a response has NaN.
    """
    return read_tests(cache, units, "loss")


def read_tests(
    cache: Cache, units: Sequence[Unit], column: str
) -> dict[str, Float[np.ndarray, "u t"]]:
    """A numeric column of every test's rows (loss, correct, n_response_tokens), null as NaN."""
    found: dict[str, list[np.ndarray]] = {}
    held: dict[str, dict[str, np.ndarray]] = {}
    for unit in units:
        if unit.key not in held:
            held[unit.key] = _by_test(cache.read(unit.key), column)
        for name, values in held[unit.key].items():
            found.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in found.items()}


def read_facts(cache: Cache, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """What is known of each training: rows, left_out, tokens, steps, seconds, device."""
    return [cache.read(unit.key).meta["training"] for unit in units]


def _by_test(shard: Shard, column: str) -> dict[str, np.ndarray]:
    names = np.asarray(shard.table.column("test").to_pylist())
    values = shard.floats(column)
    return {str(name): values[names == name] for name in dict.fromkeys(names.tolist())}


def _contents(test: Tested) -> dict[str, Any]:
    rows = [[file.content_hash, file.rows] for file in test.files]
    rule = {"answers": RULE} if test.exact_match else {}
    asked = {"exact_match": test.exact_match, "max_new_tokens": test.max_new_tokens}
    return {"files": rows, **asked, **rule}
