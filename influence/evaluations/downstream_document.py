"""Losses of all trainings, read and put together with what each took: the evaluation's document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from influence import cost
from influence.cold_cost import ColdCost
from influence.config import Config
from influence.config_downstream import FULL, RANDOM, UNTRAINED, DownstreamConfig
from influence.evaluations import downstream_results as results
from influence.evaluations.downstream_arms import Selected, names_of, seeds_of
from influence.finetune_job import settings_of
from influence.job import Job
from influence.methods import METHODS
from influence.model_shape import passes_shape
from influence.retraining import Tested, Training, read_facts, read_tests
from influence.units import Unit

Key = tuple[str, str]
"""Target and name."""
ByTest = Mapping[str, Float[np.ndarray, "s rows"]]


@dataclass(frozen=True)
class Made:
    """The trainings of one (target, name): one for each seed."""

    trainings: list[Training]
    units: list[Unit]


def section_of(config: Config) -> DownstreamConfig:
    """The evaluation's section."""
    section = config.evaluation.downstream
    assert section is not None
    return section


def names_in(job: Job) -> list[str]:
    """What is compared on every target, in the order of the tables."""
    section = section_of(job.config)
    return [UNTRAINED, *names_of(job.config), *([FULL] if section.full else [])]


def document(
    job: Job,
    reduce: Any,
    tests: Mapping[str, Tested],
    selected: Selected,
    made: Mapping[Key, Made],
) -> results.Downstream:
    """Read the losses of every training, which are all there, and compare.

    reduce: a `DownstreamReduce`, or what stands for it.
    """
    config, section = job.config, section_of(job.config)
    units = [unit for each in made.values() for unit in each.units]
    losses = _by_key(made, read_tests(job.cache, units, "loss"))
    tokens = read_tests(job.cache, units[:1], "n_response_tokens")
    costs = _training_costs(job, reduce, made)
    targets, compared = {}, {}
    for target in config.targets:
        # A row without a loss has none whatever was trained on.
        kept = np.isfinite(losses[target, UNTRAINED][target][0])
        own = {n: _over_seeds(losses[target, n][target][:, kept], section) for n in names_in(job)}
        found, contrasts, judge = results.compare(
            {name: [values] for name, values in own.items()}, section.baseline
        )
        for name, result in found.items():
            ppl = results.perplexities(own[name], tokens[target][0][kept])
            result.perplexity = _estimate(ppl, name)
            others = {t: float(np.nanmean(v)) for t, v in losses[target, name].items()}
            result.elsewhere = {test: loss for test, loss in others.items() if test != target}
            if len(made[target, name].trainings[0].rows):
                result.training = costs[target, name]
            result.selection = _selection_cost(selected, target, name)
        results.mark_front(found)
        compared[target] = own
        targets[target] = results.TargetResult(
            rows=int(kept.sum()),
            without_loss=int((~kept).sum()),
            results=found,
            contrasts=contrasts,
            judge=judge,
        )
    _put_answers(job, tests, made, targets)
    return results.Downstream(
        targets=targets,
        overall=_overall(targets, compared, made, section) if len(targets) > 1 else None,
        about=_about(config, section),
    )


def _put_answers(
    job: Job,
    tests: Mapping[str, Tested],
    made: Mapping[Key, Made],
    targets: Mapping[str, results.TargetResult],
) -> None:
    """The part of right answers, where they were generated."""
    if not any(test.exact_match for test in tests.values()):
        return
    units = [unit for each in made.values() for unit in each.units]
    correct = _by_key(made, read_tests(job.cache, units, "correct"))
    for target, each in targets.items():
        for name, result in each.results.items():
            right = correct[target, name][target]
            known = np.isfinite(right).all(axis=0)  # a row without an answer to compare has none
            if tests[target].exact_match:
                each.answers = int(known.sum())
            if tests[target].exact_match and known.any():
                result.exact_match = _estimate(right[:, known].mean(axis=1), name)


def _over_seeds(
    losses: Float[np.ndarray, "s rows"], section: DownstreamConfig
) -> Float[np.ndarray, "seeds rows"]:
    """The untrained model's one result stands for every seed."""
    return np.repeat(losses, section.seeds or 1, axis=0) if len(losses) == 1 else losses


def _estimate(values: Float[np.ndarray, " seeds"], name: str) -> results.Estimate:
    found = results.estimate(values)
    if name == UNTRAINED:
        found.error = None
    return found


def _by_key(
    made: Mapping[Key, Made], values: Mapping[str, Float[np.ndarray, "u rows"]]
) -> dict[Key, dict[str, Float[np.ndarray, "s rows"]]]:
    """Values of all units, in their order, by target and name."""
    found, start = {}, 0
    for key, each in made.items():
        stop = start + len(each.units)
        found[key] = {test: own[start:stop] for test, own in values.items()}
        start = stop
    return found


def _training_costs(
    job: Job, reduce: Any, made: Mapping[Key, Made]
) -> dict[Key, results.TrainingCost]:
    shape, recipe = passes_shape(job.config), settings_of(job.config)
    found = {}
    for key, each in made.items():
        rows = [np.asarray(training.rows, dtype=np.int64) for training in each.trainings]
        loads = reduce.row_loads(rows, job.config.finetune.max_length)
        flops = [cost.passes(shape, load.times(recipe.epochs)) for load in loads]
        found[key] = results.training_cost(read_facts(job.cache, each.units), flops)
    return found


def _selection_cost(selected: Selected, target: str, name: str) -> results.SelectionCost | None:
    costs: list[ColdCost] = [
        each for key, each in selected.cost.items() if key[:2] == (target, name)
    ]
    return results.selection_cost(costs) if costs else None


def _overall(
    targets: Mapping[str, results.TargetResult],
    compared: Mapping[str, Mapping[str, Float[np.ndarray, "seeds rows"]]],
    made: Mapping[Key, Made],
    section: DownstreamConfig,
) -> results.TargetResult:
    """Mean over the targets, each one's selection tested on its own rows.

    Costs are added up; a training that serves several targets counts once, and so do scores that
    are a function of the candidate alone.
    """
    names = list(next(iter(compared.values())))
    losses = {name: [own[name] for own in compared.values()] for name in names}
    found, contrasts, judge = results.compare(losses, section.baseline)
    for name, result in found.items():
        apart = {tuple(u.key for u in made[target, name].units): target for target in targets}
        own = [targets[target].results[name].training for target in apart.values()]
        trained = [one for one in own if one is not None]
        each = [target.results[name] for target in targets.values()]
        chosen = [one.selection for one in each if one.selection is not None]
        if trained:
            fields = results.TrainingCost.model_fields
            result.training = results.TrainingCost(
                **{key: sum(getattr(one, key) for one in trained) for key in fields}
            )
        given = section.methods.get(name, {"method": RANDOM})
        if METHODS[given.get("method", Config.model_fields["method"].default)].score is not None:
            chosen = chosen[:1]
        if chosen:
            result.selection = results.SelectionCost(
                flops=sum(one.flops for one in chosen),
                seconds=sum(one.seconds for one in chosen),
                stages={},
            )
    results.mark_front(found)
    rows = sum(target.rows for target in targets.values())
    return results.TargetResult(rows=rows, results=found, contrasts=contrasts, judge=judge)


def _about(config: Config, section: DownstreamConfig) -> results.About:
    recipe = settings_of(config).that_count()
    for name in ("seed", "evaluate_every"):
        del recipe[name]
    return results.About(
        model=config.model.name,
        adapter=config.finetune.adapter or config.model.adapter,
        baseline=section.baseline,
        seeds=seeds_of(config),
        weighted=section.weighted,
        recipe={
            key: value for key, value in recipe.items() if key not in ("seed", "evaluate_every")
        },
    )
