"""What evaluations have in common: a run of their own with In2Core's gradients of all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from influence import storage
from influence.config import Config
from influence.config_checks import check_together
from influence.config_finetune import FinetuneConfig
from influence.errors import InputError
from influence.in2core import gradient_units
from influence.job import Job, run_units, timed
from influence.methods import METHODS
from influence.pipeline import catalogue
from influence.pool_units import contamination_units
from influence.reducer import Reducer
from influence.retraining_rows import Training, WrittenTraining, write_trainings
from influence.score_shards import scoring_url
from influence.units import ExactUnits

#: What an evaluation reads of a config beside the targets.
_SECTIONS = ("model", "data", "gradients", "layers", "layer_economy", "reference", "replicas")
_BESIDE = ("seed", "prices")
_FOLDER = "evaluations"
#: What methods with a reference model alone have a use for.
_OF_REFERENCES = ("reference", "transfer", "coverage", "layers", "layer_economy")
#: Of a training, what is not the evaluation's user's to say.
_DECIDED = ("data", "fraction", "weights", "evaluate", "evaluate_every", "output", "workers")
DEFAULT = str(Config.model_fields["method"].default)


def own_config(config: Config, name: str, **changes: Any) -> Config:
    """The config of an evaluation's run: of the user's what it reads, with `method: in2core`.

    changes: sections in place of the user's; `gradients` are put over those.

    Raises:
        InputError: gradients that In2Core has no use for.
    """
    given = config.model_dump(exclude_unset=True)
    kept = {key: given[key] for key in (*_SECTIONS, *_BESIDE) if key in given}
    gradients = {**kept.pop("gradients", {}), **changes.pop("gradients", {})}
    own = Config.model_validate(
        {
            **kept,
            "run": storage.join(config.run, _FOLDER, name),
            "cache": config.cache_url,
            "targets": given["targets"],
            "method": "in2core",
            "contamination": None,  # every row is held against the targets, like ones as well
            "gradients": gradients,
            "evaluation": {name: getattr(config.evaluation, name)},
            **changes,
        }
    )
    check_together(own, f"evaluation.{name}")
    return own


def evaluated_run(config: Config, name: str) -> str:
    """The run that an evaluation's own config is of."""
    return config.run.removesuffix(f"/{_FOLDER}/{name}")


def all_gradients(job: Job, reduce: Any, take: Callable[[], str] | None = None) -> ExactUnits:
    """Tokenise, and take the gradients of every row; returns their units.

    take: is called once the catalogue is known, before a model runs; returns a line to show.
    """
    load_catalogue(job, reduce, take)
    units = gradient_units(job, reduce)
    run_gradients(job, units)
    return units


def load_catalogue(job: Job, reduce: Any, take: Callable[[], str] | None = None) -> None:
    """Tokenise; see `all_gradients`."""
    pool, targets = catalogue(job)
    with timed(job, "catalogue"):
        job.log.manifest.counts = reduce.load_catalogue(pool, targets, contamination_units(job))
        if take is not None:
            job.progress.note(take())
    job.tokens = reduce.tokens_of


def run_gradients(job: Job, units: ExactUnits) -> None:
    """Compute what the cache lacks of them."""
    assert job.shape is not None  # of gradient_units or model_shape
    job.log.manifest.coverage = job.shape.coverage
    run_units(job, units.all)


def kept_sections(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """What an evaluation on the config's pool reads of it: sections as they were given.

    Among them is a contamination that drops rows: no method can select them, so they are no truth
    either, and nothing to train on. One that flags them decides nothing here. And how a row's loss
    is reduced, which is what a training lowers.
    """
    given = config.model_dump(mode="json", exclude_unset=True)
    drops = config.contamination is not None and config.contamination.action == "drop"
    kept = {key: given[key] for key in names if key in given}
    kept["contamination"] = given["contamination"] if drops else None
    if config.gradients.reduction in ("sum", "sqrt"):
        kept.setdefault("gradients", {"reduction": config.gradients.reduction})
    return kept


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; of a section in both, key by key."""
    found = dict(base)
    for key, value in over.items():
        before = found.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        found[key] = merged(before, value) if both else value  # pyright: ignore[reportArgumentType]
    return found


def with_changes(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with one method's changes.

    Of another method than the base's, sections of the base that it has no use for are left out
    (`optimizer`, with `rds` say); those that the changes name stay, to be judged as ever.
    """
    whole = merged(base, changes)
    method = METHODS.get(whole.get("method", DEFAULT))
    if method is None or "method" not in changes:
        return whole
    used = {
        "optimizer": method.steps,
        "warmup": method.steps or method.at_checkpoints,
        "weights": method.solves_weights,
        **dict.fromkeys(_OF_REFERENCES, method.reference_model),
    }
    return {k: v for k, v in whole.items() if used.get(k, True) or k in changes}


def recipe_of(section: FinetuneConfig | None, config: Config, key: str) -> dict[str, Any]:
    """How an evaluation trains, as it was given: by its own section, or by `finetune`.

    Raises:
        InputError: the own section names what an evaluation decides.
    """
    if section is None:
        return config.finetune.model_dump(mode="json", exclude_unset=True)
    for name in _DECIDED:
        if name in section.model_fields_set:
            raise InputError(
                f"{key}.finetune.{name}: an evaluation trains on the rows that it compares, with "
                "one worker, and is tested by `tests`; leave it out"
            )
    return section.model_dump(mode="json", exclude_unset=True)


class OwnReduce:
    """The select job's reducer, for every step that is its own; others add theirs beside it."""

    def __init__(self, config: Config) -> None:
        self.reducer = Reducer(config)

    def __getattr__(self, step: str) -> Any:
        return getattr(self.reducer, step)

    def write_trainings(self, trainings: Sequence[Training]) -> list[WrittenTraining]:
        """After `load_catalogue`: their rows, beside the run's scores, for the replicas to read."""
        assert self.reducer.pool is not None
        return write_trainings(self.reducer.pool, trainings, scoring_url(self.reducer.config.run))
