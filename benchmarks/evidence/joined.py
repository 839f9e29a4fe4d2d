"""Evaluations of one judge in several runs as one document, judged anew from every row's losses.

python benchmarks/evidence/joined.py FIRST/evaluation.json OTHER/evaluation.json \\
    --trainings CACHE/retraining > evaluation.json

What the selections cost is as their own evaluations say it. The losses are those of the trainings'
shards: a training is known by its mean losses.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from influence.evaluations.downstream_results import (
    Downstream,
    TargetResult,
    compare,
    mark_front,
)

Losses = dict[str, Float[np.ndarray, "seeds rows"]]
"""By selection."""


def read(path: Path) -> Downstream:
    """The downstream part of an evaluation.json."""
    return Downstream.model_validate(json.loads(path.read_text())["downstream"])


def joined(first: Downstream, other: Downstream) -> Downstream:
    """The first with the selections that only the other has; their differences are still missing.

    Raises:
        ValueError: they are not judged alike: another recipe, or another loss of what both have.
    """
    if first.about != other.about:
        raise ValueError(f"not one judge: {first.about} and {other.about}")
    groups = {name: (each, other.targets[name]) for name, each in first.targets.items()}
    made = {name: _joined(name, *each) for name, each in groups.items()}
    overall = first.overall
    if overall is not None and other.overall is not None:
        overall = _joined("both", overall, other.overall)
    return first.model_copy(update={"targets": made, "overall": overall})


def _joined(group: str, first: TargetResult, other: TargetResult) -> TargetResult:
    for name in [each for each in first.results if each in other.results]:
        losses = first.results[name].by_seed, other.results[name].by_seed
        if losses[0] != losses[1]:
            raise ValueError(f"{group}: {name} has losses {losses[0]} and {losses[1]}")
    results = first.results | {n: r for n, r in other.results.items() if n not in first.results}
    return first.model_copy(update={"results": results})


class Trainings:
    """Every training's losses, row by row, in a folder of its shards."""

    def __init__(self, folder: Path) -> None:
        self._found: dict[str, list[Float[np.ndarray, " rows"]]] = defaultdict(list)
        for path in sorted(folder.glob("*/*.parquet")):
            table = pq.read_table(path, columns=["test", "position", "loss"]).sort_by("position")
            for test in table["test"].unique().to_pylist():
                rows = table.filter(pc.field("test") == test)
                self._found[test].append(rows["loss"].drop_null().to_numpy())

    def of(self, test: str, mean: float, *, atol: float = 1e-12) -> Float[np.ndarray, " rows"]:
        """The losses of a test with this mean.

        Raises:
            ValueError: no training has it, or several that are not the same.
        """
        found = [each for each in self._found[test] if abs(each.mean() - mean) <= atol]
        if not found or any(not np.array_equal(found[0], each) for each in found):
            raise ValueError(f"{test}: {len(found)} trainings have the mean loss {mean!r}")
        return found[0]

    def losses(self, test: str, target: TargetResult) -> Losses:
        """Of every selection and seed."""
        return {
            name: np.stack([self.of(test, mean) for mean in result.by_seed])
            for name, result in target.results.items()
        }


def judged(found: Downstream, trainings: Trainings) -> Downstream:
    """The same selections, compared by the losses of every row."""
    losses = {name: trainings.losses(name, each) for name, each in found.targets.items()}
    baseline = found.about.baseline
    targets = {
        name: _judged(each, {n: [own] for n, own in losses[name].items()}, baseline)
        for name, each in found.targets.items()
    }
    overall = found.overall
    if overall is not None:
        every = {name: [own[name] for own in losses.values()] for name in overall.results}
        overall = _judged(overall, every, baseline)
    return found.model_copy(update={"targets": targets, "overall": overall})


def _judged(
    target: TargetResult, losses: Mapping[str, list[Float[np.ndarray, "seeds rows"]]], baseline: str
) -> TargetResult:
    results, contrasts, judge = compare(losses, baseline)
    kept = {
        name: target.results[name].model_copy(
            update={"loss": own.loss, "by_seed": own.by_seed, "gain": own.gain}
        )
        for name, own in results.items()
    }
    mark_front(kept)
    return target.model_copy(update={"results": kept, "contrasts": contrasts, "judge": judge})


def main() -> None:
    """Join, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--trainings", type=Path, required=True)
    asked = parser.parse_args()
    found = reduce(joined, map(read, asked.evaluations))
    document = {"downstream": judged(found, Trainings(asked.trainings)).model_dump()}
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
