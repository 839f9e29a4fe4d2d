"""The selections that are compared: one select run for each target and method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from pydantic import BaseModel, ValidationError

from influence import storage
from influence.cold_cost import ColdCost, cold_cost
from influence.config import Config, ModelConfig
from influence.config_content import content_values
from influence.config_downstream import RANDOM
from influence.config_loading import parse_config
from influence.contamination_units import contamination_print, guards_of
from influence.errors import InfluenceError, InputError, InterruptedRunError, RunTakenError
from influence.evaluations.own_run import merged, with_changes
from influence.fingerprints import fingerprint, stage_fingerprints
from influence.hub import resolve_revision
from influence.job import Job
from influence.pipeline import against_files
from influence.records import to_json
from influence.reference import with_reference
from influence.replica import load_tokenizer
from influence.retraining import training_seeds
from influence.run_log import read_manifest
from influence.schemas import FORMAT_VERSION
from influence.tokenization import template_fingerprint

NAME = "downstream"
KEY = f"evaluation.{NAME}"
FILE = "arm.json"
#: What an arm has of the evaluation: where it is, what it is of, and what comes after it.
_FIXED = ("run", "cache", "targets", "evaluation", "finetune", "coverage", "transfer", "prices")
_FIXED_DATA = ("candidates", "limit")
#: What all of them share, and a method may change for itself.
_SHARED = ("data", "replicas")
#: What a random draw that nobody configured leaves out of the config: methods' own settings.
_OF_METHODS = ("embedding", "gradients", "landmarks", "optimizer", "warmup", "weights")
_OF_METHODS += ("reference", "layers", "layer_economy")
#: Of an arm's config, what changes no selection.
_FREE = frozenset({"run", "cache", "replicas", "prices", "evaluation", "finetune"})


@dataclass(frozen=True)
class Arm:
    """One selection: `seed` is that of a draw which every training has anew, else None."""

    target: str
    name: str
    seed: int | None
    config: Config

    @property
    def label(self) -> str:
        """As errors and notes call it, and its folder."""
        return _label(self.target, self.name, self.seed)


class ArmRecord(BaseModel):
    """`arm.json`: of what a run is the selection, and what it takes with an empty cache."""

    fingerprint: str
    cost: ColdCost


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a select run chose: positions in a pool of `of` rows, and their weights.

    scored: positions of all rows that it chose from, where they are asked for.
    """

    rows: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    of: int
    scored: Int[np.ndarray, " e"] | None = None


@dataclass(frozen=True)
class Selected:
    """Selections by target, name and seed (None where one is for all seeds), and the failures.

    Attributes:
        chosen: the rows.
        cost: with an empty cache.
        failed: what went wrong, by the arm's label.
    """

    chosen: dict[tuple[str, str, int | None], Chosen]
    cost: dict[tuple[str, str, int | None], ColdCost]
    failed: dict[str, InfluenceError]

    def of(self, target: str, name: str, seed: int) -> Chosen | None:
        """The selection that a training with this seed is on; None if it failed."""
        return self.chosen.get((target, name, None)) or self.chosen.get((target, name, seed))


def names_of(config: Config) -> list[str]:
    """The methods in order, the baseline first."""
    section = config.evaluation.downstream
    assert section is not None
    return list(dict.fromkeys([section.baseline, *section.methods]))


def seeds_of(config: Config) -> list[int]:
    """The seeds of the trainings."""
    section = config.evaluation.downstream
    assert section is not None
    count = section.seeds if section.seeds is not None else config.evaluation.seeds
    return training_seeds(config, count)


def whole_methods(config: Config) -> dict[str, dict[str, Any]]:
    """Of the user's config, each method with all that its selections depend on.

    What is not in it is the evaluation's own: targets, the pool's files and replicas.

    Raises:
        InputError: names evaluation.downstream.methods.NAME and a key that is not a method's.
    """
    section = config.evaluation.downstream
    assert section is not None
    given = config.model_dump(mode="json", exclude_unset=True)
    found = {}
    kept = {key: value for key, value in given.items() if key not in (*_FIXED, *_SHARED)}
    for name in names_of(config):
        if name not in section.methods:
            plain = {key: value for key, value in kept.items() if key not in _OF_METHODS}
            found[name] = {**plain, "method": RANDOM}
            continue
        _check_overrides(name, section.methods[name])
        found[name] = with_changes(kept, section.methods[name])
        if found[name].get("method") == RANDOM and "seed" in section.methods[name]:
            raise InputError(f"{KEY}.methods.{name}.seed: a random draw has the training's")
    return found


def _check_overrides(name: str, overrides: Mapping[str, Any]) -> None:
    own = overrides.get("data")
    inside = [f"data.{key}" for key in _FIXED_DATA if isinstance(own, dict) and key in own]
    for key in (*(key for key in _FIXED if key in overrides), *inside):
        raise InputError(
            f"{KEY}.methods.{name}.{key}: is the same for all methods; expected other keys"
        )


def arms_of(config: Config) -> list[Arm]:
    """Every selection of the evaluation's own config, seen to be one that can be run.

    Raises:
        InputError: names evaluation.downstream.methods.NAME and the key that is wrong.
    """
    section = config.evaluation.downstream
    assert section is not None
    given = config.model_dump(mode="json", exclude_unset=True)
    shared = {key: given[key] for key in _SHARED if key in given}
    arms = []
    for target in config.targets:
        for name, method in section.methods.items():
            data = merged(shared, method)
            data["targets"] = {target: given["targets"][target]}
            data["cache"] = config.cache_url
            for seed in seeds_of(config) if data.get("method") == RANDOM else (None,):
                label = _label(target, name, seed)
                own: dict[str, Any] = {} if seed is None else {"seed": seed}
                own["run"] = storage.join(config.run, *label.split("/"))
                arms.append(Arm(target, name, seed, _parsed({**data, **own}, name)))
    return arms


def _label(target: str, name: str, seed: int | None) -> str:
    return f"{target}/{name}" + ("" if seed is None else f"-seed{seed}")


def _parsed(data: dict[str, Any], name: str) -> Config:
    place = f"{KEY}.methods.{name}"
    try:
        config = parse_config(data, name=place)
        with_reference(config)
    except InputError as error:
        raise type(error)(_own_keys(str(error), place)) from None
    return config


def _own_keys(text: str, place: str) -> str:
    """An error about an arm's config with keys as they stand in the evaluation's section."""
    if not text.startswith(place):
        text = f"{place}: {text}"
    lines = [line.removeprefix(f"{place}: ") for line in text.splitlines()]
    lines = [re.sub(r"unknown key '([\w.]+)'", rf"unknown key '{place}.\1'", x) for x in lines]
    key = r"^'?([a-z_]+(?:\.\w+)*)'?(: | is missing)"
    lines = [re.sub(key, rf"{place}.\1\2", line) for line in lines]
    return "\n".join(x if place in x else f"{place}: {x}" for x in lines)


def run_arms(job: Job) -> Selected:
    """Make every selection that is not there; one that fails does not keep the others from it.

    job: the evaluation's own, whose files are those of every arm.
    """
    found, section = Selected({}, {}, {}), job.config.evaluation.downstream
    assert section is not None
    prints = _Prints(job)
    for arm in arms_of(job.config):
        job.log.doing(f"selection: {arm.label}")
        job.log.save()
        try:
            print_ = prints.of(arm)
            record = _made(arm, print_)
            if record is None:
                job.progress.note(f"{NAME}: selecting {arm.label}")
                record = _select(arm, print_, job)
        except (InterruptedRunError, RunTakenError):
            raise
        except InfluenceError as error:
            job.progress.note(f"{NAME}: {arm.label} failed: {error}")
            found.failed[arm.label] = error
            continue
        key = (arm.target, arm.name, arm.seed)
        everything = section.full and arm.name == section.baseline
        found.chosen[key] = read_chosen(arm.config.run, everything=everything)
        found.cost[key] = record.cost
    return found


def _select(arm: Arm, print_: str, job: Job) -> ArmRecord:
    assert job.select_run is not None
    record_url = storage.join(arm.config.run, FILE)
    # Before the run is another method's: a stop between the two would leave it an old record.
    storage.delete(record_url)
    costs: list[ColdCost] = []
    job.select_run(arm.config, after=lambda own, reduce: costs.append(cold_cost(own, reduce)))
    record = ArmRecord(fingerprint=print_, cost=costs[0])
    storage.put(record_url, to_json(record))
    return record


def _made(arm: Arm, print_: str) -> ArmRecord | None:
    """The record of a selection that is done, of the same config and rows; else None."""
    manifest = read_manifest(arm.config.run)
    url = storage.join(arm.config.run, FILE)
    if manifest is None or manifest.state != "done" or storage.head(url) is None:
        return None
    try:
        record = ArmRecord.model_validate_json(storage.read_bytes(url))
    except ValidationError:
        return None
    return record if record.fingerprint == print_ else None


class _Prints:
    """Digests of all that decides an arm's selection: its config, and what its paths hold."""

    def __init__(self, job: Job) -> None:
        self._job = job
        # Reading a tokenizer takes seconds, and most arms have the same one.
        self._templates = {
            _files_of(job.config.model): job.fingerprints["catalogue"].values["template"]
        }

    def of(self, arm: Arm) -> str:
        """Raises InputError: a file, a model or an adapter of its config is not there."""
        config, job = resolve_revision(with_reference(arm.config)), self._job
        before = config
        if config.optimizer.state is None:
            # A warm-up that makes the state has a section that says all of it.
            stateless = config.optimizer.model_copy(update={"kind": "sgd"})
            before = config.model_copy(update={"optimizer": stateless})
        prints = stage_fingerprints(before, self._template(config.model))
        targets = {arm.target: job.target_files[arm.target]}
        guards = guards_of(targets, against_files(config))
        prints |= contamination_print(config, guards)
        values = content_values(config, prints, job.files, targets, without=_FREE)
        return fingerprint({"format_version": FORMAT_VERSION, **values}).hex

    def _template(self, model: ModelConfig) -> str:
        files = _files_of(model)
        if files not in self._templates:
            self._templates[files] = template_fingerprint(load_tokenizer(model))
        return self._templates[files]


def _files_of(model: ModelConfig) -> str:
    """Of a model's section, what decides which tokenizer is read."""
    return model.model_copy(update={"adapter": None, "adapter_revision": None}).model_dump_json()


def read_chosen(run: str, *, everything: bool = False) -> Chosen:
    """The selected rows of RUN/scores, in the pool's order; with `everything` the scored ones."""
    rows, weights, scored, start = [], [], [], 0
    for info in storage.list_objects(storage.join(run, "scores")):
        with pq.ParquetFile(storage.open_input(info.url)) as part:
            table = part.read(columns=["weight", "score"])
        weight, score = (table.column(n).to_numpy().astype(float) for n in ("weight", "score"))
        own = np.flatnonzero(weight > 0)
        rows.append(start + own)
        weights.append(weight[own])
        if everything:
            scored.append(start + np.flatnonzero(np.isfinite(score)))
        start += len(weight)
    all_scored = np.concatenate(scored) if everything else None
    return Chosen(np.concatenate(rows), np.concatenate(weights), start, all_scored)


def failure(failed: Mapping[str, InfluenceError]) -> InfluenceError:
    """One error for all selections that failed; the first one's kind decides the exit code."""
    lines = [f"{KEY}: {len(failed)} selection(s) failed; the others and their trainings stand."]
    lines += [f"  {label}: {error}" for label, error in failed.items()]
    lines.append("Mend the cause and run the same command again: it goes on from there.")
    return type(next(iter(failed.values())))("\n".join(lines))
