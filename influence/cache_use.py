"""What configs and runs use of a cache: the fingerprints of every stage, by the job's own code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from influence import storage
from influence.cache import Cache
from influence.checkpoint_units import checkpoint_fingerprints
from influence.config import Config
from influence.config_loading import load_config, parse_config
from influence.embedding_plan import considered_embeddings
from influence.errors import InputError
from influence.evaluations import EVALUATIONS
from influence.exact_work import product_fingerprints, target_vector_units
from influence.hub import resolve_revision
from influence.methods import METHODS
from influence.own_training import OwnTraining, planned_training
from influence.pipeline import Job, catalogue_units, prepare_targets
from influence.progress import Progress
from influence.records import Manifest
from influence.reducer import Reducer
from influence.reference import with_reference
from influence.run_log import RunLog, read_manifest
from influence.transfer import pilot_config, target_config
from influence.units import bundled
from influence.worker import Worker

Place = tuple[str, str]
"""A stage and a fingerprint: the folder of a cache in which their shards lie."""


@dataclass(frozen=True)
class Use:
    """What one config or run uses.

    Attributes:
        label: the config or run as it was named.
        run: the run directory that it belongs to.
        cache: the cache that its config names, where that was read.
        places: the values that the fingerprint of each place covers; {} where they are not known.
    """

    label: str
    run: str
    cache: str | None
    places: Mapping[Place, dict[str, Any]]


def use_of(named: str, cache: str) -> Use:
    """Every stage of a config, for all of its targets, whether its method computes it or not, and
    of the evaluations and the target model that it names.

    `named` is a config's path or a run directory; of a run directory its config.yaml counts, and
    also what its manifest says that the run used (its model may have changed since). `cache` is
    the cache that the target's rows are looked up in.

    Raises:
        InputError: no such config or run, or files or a model that are not there: nothing is known
            then of what it uses.
    """
    config, is_run = _load(named)
    try:
        _check_pool(config)
        own = config.model_copy(update={"cache": cache})
        places = _resolved(own) | _of_transfer(own)
        with _after_warmup(own) as (ready, _trained):
            evaluated = [
                evaluation.settings(own if evaluation.as_written else ready)
                for name, evaluation in EVALUATIONS.items()
                if getattr(config.evaluation, name) is not None
            ]
            for settings in evaluated:
                places |= _resolved(settings)
    except InputError as error:
        raise InputError(f"{named}: cannot tell what it uses: {error}") from None
    # Which layers `layers: auto` keeps, and which directions there are, only the run's own record
    # says.
    by_record = config.layers == "auto" or config.weights.order == 2
    runs = [named] if is_run else [config.run] * by_record
    runs += [settings.run for settings in evaluated if by_record]
    runs += _made_by(config)
    for run in runs:
        recorded = read_manifest(run)
        if recorded is not None:
            places = {**_recorded(recorded), **places}
    return Use(named, named if is_run else config.run, config.cache_url, places)


def _made_by(config: Config) -> list[str]:
    """The runs of evaluations that make select runs of their own, and those runs."""
    folders = [
        storage.join(config.run, "evaluations", name)
        for name, evaluation in EVALUATIONS.items()
        if evaluation.as_written and getattr(config.evaluation, name) is not None
    ]
    listed = [info.url for folder in folders for info in storage.list_objects(folder)]
    end = "/manifest.json"
    return [url.removesuffix(end) for url in listed if url.endswith(end)]


def recorded_use(run: str) -> Use:
    """What a run used, by its manifest alone: needs neither its data nor its model.

    Raises:
        InputError: no manifest there, or none of this version.
    """
    manifest = read_manifest(run)
    if manifest is None:
        raise InputError(
            f"{run}: no manifest.json there; expected the run directory of an `influence select` "
            "that has begun"
        )
    return Use(run, run, None, _recorded(manifest))


def _load(named: str) -> tuple[Config, bool]:
    """The config of a path or a run directory, and whether it was a run directory."""
    if not os.path.isfile(named):
        url = storage.join(named, "config.yaml")
        if storage.head(url) is not None:
            try:
                data = yaml.safe_load(storage.read_bytes(url))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"{url}: not valid YAML: {error}") from None
            return parse_config(data, name=url), True
        if os.path.isdir(named) or "://" in named:
            raise InputError(
                f"{named}: no config.yaml there; expected a config's path, or the run directory of "
                "an `influence select`"
            )
    return load_config(named), False


def _check_pool(config: Config) -> None:
    """See that the pool's files are there; no fingerprint needs a byte of them."""
    for pattern in config.data.candidates:
        try:
            url = storage.expand(pattern)[0]
        except InputError as error:
            raise InputError(f"data.candidates: {error}") from None
        if storage.head(url) is None:
            raise InputError(f"data.candidates: {url}: no such file or object; check the path")


def _resolved(config: Config) -> dict[Place, dict[str, Any]]:
    config = resolve_revision(with_reference(config))
    with planned_training(config) as (ready, trained):
        places = _places(ready)
    if trained is not None:
        places[trained.stage, trained.fingerprint.hex] = trained.fingerprint.values
    return places


def _after_warmup(config: Config) -> AbstractContextManager[tuple[Config, OwnTraining | None]]:
    """The config that its evaluations are of; see `influence.evaluate`."""
    return nullcontext((config, None)) if config.warmup is None else planned_training(config)


def _of_transfer(config: Config) -> dict[Place, dict[str, Any]]:
    """What asking the target model uses: its adapter, where the job makes one, and a pilot."""
    own = target_config(config)
    if own is None:
        return {}
    with planned_training(resolve_revision(own)) as (ready, trained):
        places = _places(pilot_config(ready, config.run))
    if trained is not None:
        places[trained.stage, trained.fingerprint.hex] = trained.fingerprint.values
    return places


def _places(config: Config) -> dict[Place, dict[str, Any]]:
    log = RunLog.unsaved(config.run, config.method)
    job = prepare_targets(config, Progress(quiet=True), log)
    places = {(stage, found.hex): found.values for stage, found in job.fingerprints.items()}
    for found in considered_embeddings(job):
        places["embedding", found.hex] = found.values
    if METHODS[config.method].needs_gradients and config.gradients.projection == "exact":
        vectors = target_vector_units(job, _reducer_of_targets(job))
        for name, found in product_fingerprints(job, vectors).items():
            places["inner_products", found.hex] = {"target": name, **found.values}
    if METHODS[config.method].at_checkpoints:
        template = job.fingerprints["catalogue"].values["template"]
        for each in checkpoint_fingerprints(config, template):
            places |= {(stage, found.hex): found.values for stage, found in each.items()}
    return places


def _reducer_of_targets(job: Job) -> Reducer:
    """A reducer that knows the targets' columns.

    Their rows are read as the job reads them, from the catalogue shards in the cache; what is
    missing there is tokenised, but nothing is written to the cache.
    """
    _, targets = catalogue_units(job)
    units = [unit for members in targets.values() for unit in members]
    with TemporaryDirectory() as folder:
        config = job.config.model_copy(update={"cache": folder})
        copies, worker = Cache(folder), Worker(config)
        for key in job.cache.present([unit.key for unit in units]):
            storage.put(copies.locate(key), storage.read_bytes(job.cache.locate(key)))
        try:
            for bundle in bundled(units):
                worker.run(bundle)
        finally:
            worker.close()
        reducer = Reducer(config)
        reducer.load_targets(targets)
    return reducer


def _recorded(manifest: Manifest) -> dict[Place, dict[str, Any]]:
    places: dict[Place, dict[str, Any]] = {}
    for stage, record in manifest.stages.items():
        # Inner products have a fingerprint for each target; the record holds the first one's.
        for key in record.planned:
            places.setdefault((stage, key.split("/")[1]), {})
        if record.fingerprint:
            places[stage, record.fingerprint] = record.values
    return places
