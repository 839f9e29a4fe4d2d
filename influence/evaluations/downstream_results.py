"""From losses by selection, seed and test row to the document of `evaluation.downstream`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel

from influence.cold_cost import ColdCost, StageCost
from influence.config_downstream import FULL, UNTRAINED
from influence.paired import (
    DRAWS,
    compared,
    gain_share,
    interval,
    pareto_front,
    resampled_means,
    seed_means,
    variance_ratio,
)
from influence.records import Interval

#: The effect over its standard error that `seeds_needed` is for.
TIMES = 5.0


class Estimate(BaseModel):
    """A mean over seeds, and its standard error; None of one seed."""

    mean: float
    error: float | None


class Contrast(BaseModel):
    """`of` - `against` in nats per token, paired by seed and test row: negative: `of` is better.

    low, high: 95 % interval (`influence.paired`); None with one seed. error: standard error over
    seeds. seeds_needed: until it is a fifth of the difference; None with one seed, or without a
    difference.
    """

    of: str
    against: str
    value: float
    low: float | None
    high: float | None
    error: float | None
    seeds_needed: float | None

    @property
    def sure(self) -> bool:
        """Whether there is an interval, and it leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def turned(self) -> Contrast:
        """`against` - `of`."""
        swapped = {"of": self.against, "against": self.of, "value": -self.value}
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return self.model_copy(update={**swapped, "low": low, "high": high})


def both_ways(contrasts: Sequence[Contrast]) -> dict[tuple[str, str], Contrast]:
    """Contrasts by (of, against), each one turned round as well."""
    return {(c.of, c.against): c for each in contrasts for c in (each, each.turned)}


class SelectionCost(BaseModel):
    """Of making the selection with an empty cache; see `influence.cold_cost`."""

    flops: float
    seconds: float
    stages: dict[str, StageCost]


class TrainingCost(BaseModel):
    """Of one training, mean over seeds; flops without those of the factors' own gradients."""

    rows: float
    tokens: float
    seconds: float
    flops: float


class Result(BaseModel):
    """One selection, trained on and tested.

    Attributes:
        loss: mean response loss of the target's test rows, nats per token.
        by_seed: the same of every seed.
        perplexity: exponential of the mean over all response tokens; None of all targets together.
        exact_match: part of the answers that are right; None where none were generated.
        elsewhere: mean loss on the other targets' tests.
        gain: part of what the full pool gains over the untrained model; None where it is not known.
        selection: None where nothing is selected.
        training: None where nothing is trained.
        front: whether no other one has a lower loss for no more operations in all.
    """

    loss: Estimate
    by_seed: list[float]
    perplexity: Estimate | None = None
    exact_match: Estimate | None = None
    elsewhere: dict[str, float] = {}
    gain: Interval | None = None
    selection: SelectionCost | None = None
    training: TrainingCost | None = None
    front: bool = False

    @property
    def flops(self) -> float:
        """Of selecting and of one training."""
        return sum(each.flops for each in (self.selection, self.training) if each is not None)


class Judge(BaseModel):
    """Can the losses tell selections apart: standard deviations, in nats per token.

    seeds: between seeds of one selection. selections: between the selections, without what seed
    noise alone puts there; None where that is all there is.
    """

    seeds: float
    selections: float | None


class TargetResult(BaseModel):
    """All that was compared on one target's test, or on all of them together.

    answers: rows whose answers were generated and compared; None where none were asked for.
    """

    rows: int
    without_loss: int = 0
    answers: int | None = None
    results: dict[str, Result]
    contrasts: list[Contrast]
    judge: Judge | None


class About(BaseModel):
    """How it was measured; `recipe` is what counts of the fine-tuning's settings."""

    model: str
    adapter: str | None
    baseline: str
    seeds: list[int]
    weighted: bool
    recipe: dict[str, Any]
    draws: int = DRAWS


class Downstream(BaseModel):
    """The document of evaluation.json; `overall` is None with a single target."""

    targets: dict[str, TargetResult]
    overall: TargetResult | None
    about: About


def estimate(values: Sequence[float] | Float[np.ndarray, " seeds"]) -> Estimate:
    """Mean and standard error over seeds."""
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Estimate(mean=float(found.mean()), error=error)


def perplexities(
    losses: Float[np.ndarray, "seeds rows"], tokens: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " seeds"]:
    """exp of the mean loss of all response tokens; `losses` are a row's means over its own."""
    return np.exp(losses @ tokens / tokens.sum())


def compare(
    losses: Mapping[str, Sequence[Float[np.ndarray, "seeds rows"]]],
    baseline: str,
    *,
    draws: int = DRAWS,
) -> tuple[dict[str, Result], list[Contrast], Judge | None]:
    """Every selection's loss, its part of the full pool's gain, and the paired differences.

    losses: by selection, an array for each test set; FULL and UNTRAINED are no selections.
    """
    names = list(losses)
    tests = range(len(losses[names[0]]))
    values = [np.stack([losses[name][test] for name in names]) for test in tests]
    sample = dict(zip(names, resampled_means(values, draws=draws), strict=True))
    means = dict(zip(names, seed_means(values), strict=True))
    results = {
        name: Result(
            loss=estimate(means[name]),
            by_seed=means[name].tolist(),
            gain=_gain(name, means, sample),
        )
        for name in names
    }
    results[UNTRAINED].loss.error = None  # one model, whatever the seed
    contrasts = [_contrast(a, b, means, sample) for a, b in pairs(names, baseline)]
    trained = np.array([means[name] for name in names if name != UNTRAINED])
    return results, contrasts, _judge(trained)


def pairs(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """What is compared: everything with the baseline, then the others with each other."""
    others = [name for name in names if name not in (baseline, UNTRAINED, FULL)]
    last = [name for name in (FULL, UNTRAINED) if name in names]
    against = [(name, baseline) for name in (*others, *last)]
    return against + list(combinations([*others, *(n for n in last if n == FULL)], 2))


def mark_front(results: Mapping[str, Result]) -> None:
    """Set `front` of those that nothing beats in loss and operations; untrained is no choice."""
    chosen = [result for name, result in results.items() if name != UNTRAINED]
    cost = np.array([result.flops for result in chosen])
    loss = np.array([result.loss.mean for result in chosen])
    for result, front in zip(chosen, pareto_front(cost, loss).tolist(), strict=True):
        result.front = front


def selection_cost(costs: Sequence[ColdCost]) -> SelectionCost:
    """Of one selection; where each seed has its own, the mean of them."""
    names = list(dict.fromkeys(name for each in costs for name in each.stages))
    stages = {}
    for name in names:
        found = [each.stages[name] for each in costs if name in each.stages]
        stages[name] = StageCost(
            flops=sum(each.flops for each in found) / len(costs),
            seconds=sum(each.seconds for each in found) / len(costs),
            source=found[0].source,
        )
    return SelectionCost(
        flops=sum(each.flops for each in stages.values()),
        seconds=sum(each.seconds for each in stages.values()),
        stages=stages,
    )


def training_cost(facts: Sequence[Mapping[str, Any]], flops: Sequence[float]) -> TrainingCost:
    """Of one training, mean over seeds."""
    mean = {
        name: float(np.mean([f[name] for f in facts])) for name in ("rows", "tokens", "seconds")
    }
    return TrainingCost(**mean, flops=float(np.mean(flops)))


def _contrast(
    a: str,
    b: str,
    means: Mapping[str, Float[np.ndarray, " seeds"]],
    sample: Mapping[str, Float[np.ndarray, " draws"]],
) -> Contrast:
    found = compared(means[a] - means[b], sample[a] - sample[b])
    known = math.isfinite(found.error)
    needed = found.seeds_until(TIMES)
    return Contrast(
        of=a,
        against=b,
        value=found.value,
        low=found.low if known else None,
        high=found.high if known else None,
        error=found.error if known else None,
        seeds_needed=needed if math.isfinite(needed) else None,
    )


def _gain(
    name: str,
    means: Mapping[str, Float[np.ndarray, " seeds"]],
    sample: Mapping[str, Float[np.ndarray, " draws"]],
) -> Interval | None:
    if FULL not in means or name in (FULL, UNTRAINED):
        return None
    three = (UNTRAINED, name, FULL)
    value = gain_share(*(np.array([means[each].mean()]) for each in three))[0]
    draws = gain_share(*(sample[each] for each in three))
    if not np.isfinite(value):
        return None
    low, high = interval(draws)
    if len(means[name]) == 1 or not np.isfinite([low, high]).all():
        # The full pool may well gain nothing: there is no telling what the part is.
        return Interval(value=float(value))
    return Interval(value=float(value), low=low, high=high)


def _judge(means: Float[np.ndarray, "selections seeds"]) -> Judge | None:
    if means.shape[0] < 2 or means.shape[1] < 2:
        return None
    within, between = variance_ratio(means)
    return Judge(seeds=within**0.5, selections=between**0.5 if between > 0 else None)
