"""What evaluations that train the model again would take, for `influence plan` to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from influence import cost
from influence.config import Config
from influence.errors import InputError
from influence.evaluations import EVALUATIONS
from influence.evaluations.kind import Trainings
from influence.finetune_job import settings_of
from influence.load import Load
from influence.model_shape import passes_shape
from influence.quantities import Quantities, StageWork
from influence.report_format import amount, short_seconds
from influence.retraining import Tested
from influence.speeds import Speeds


def training_notes(
    config: Config, reduce: Any, counts: Mapping[str, Any], speeds: Speeds
) -> list[str]:
    """A line for each evaluation of the config that trains: how often, on what, and how long.

    Of rows of the pool's and the targets' mean lengths; the time is that of gradients, whose
    passes are the same.

    Args:
        config: as it is written, its warm-up not made.
        reduce: the reducer of the config's run, with its catalogue.
        counts: of that catalogue.
    """
    notes = []
    for name, each in EVALUATIONS.items():
        if getattr(config.evaluation, name) is None:
            continue
        try:
            own = each.settings(config)
            planned = each.trainings(own, counts)
            if planned:
                notes.append(_note(name, own, planned, each.inputs(own), reduce, counts, speeds))
        except InputError as error:
            notes.append(f"influence evaluate will be refused: {error}")
    return notes


def _note(
    name: str,
    own: Config,
    planned: Sequence[Trainings],
    tests: Mapping[str, Tested],
    reduce: Any,
    counts: Mapping[str, Any],
    speeds: Speeds,
) -> str:
    recipe, shape = settings_of(own), passes_shape(own)
    trained = reduce.training_load(1.0, recipe.seed, own.finetune.max_length)
    rows = sum(each.count * each.rows for each in planned)
    trained = trained.times(rows * recipe.epochs / max(1, trained.rows))
    count = sum(each.count for each in planned)
    tested = _tests_load(tests, counts["targets"]).times(count)
    flops = cost.passes(shape, trained) + cost.forward(shape, tested)
    speed = speeds.of(StageWork("gradients", Quantities(effort=flops)))
    least = min(round(each.rows) for each in planned if each.rows)
    most = max(round(each.rows) for each in planned)
    longest = max(test.max_new_tokens for test in tests.values())
    of_answers = f" (answers of {longest:,} at most among them)" if longest else ""
    of_rows = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f"influence evaluate, {name}: {count:,} trainings of {of_rows} rows, each tested on "
        f"{sum(test.rows for test in tests.values()):,}: "
        f"{amount(trained.tokens)} and {amount(tested.tokens)} tokens{of_answers}, "
        f"{amount(flops)}FLOP, about "
        f"{short_seconds(flops / speed.per_second)} of one replica ({speed.source}); its "
        "selections are not counted, and what the cache holds is not taken off"
    )


def _tests_load(tests: Mapping[str, Tested], targets: Mapping[str, Any]) -> Load:
    """One test of all rows, as if they were as long as the target's own, and answers, where they
    are generated, as long as they may be: a forward pass for each of their tokens."""
    total = Load()
    for name, test in tests.items():
        length = targets[name]["tokens"] / max(1, targets[name]["rows"]) + test.max_new_tokens
        tokens, squares = round(test.rows * length), round(test.rows * length**2)
        total += Load(rows=test.rows, tokens=tokens, squares=squares)
    return total
