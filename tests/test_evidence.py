"""What docs/results.md says of the downstream evaluation is what its stored losses say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jaxtyping import Float

from influence.evaluations.downstream_results import About, Downstream, TargetResult, compare

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "evidence"))

import joined as joining
import table as evidence_tables

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "benchmarks" / "results" / "evidence"


@pytest.fixture(scope="module")
def stored() -> Downstream:
    return joining.read(EVIDENCE / "downstream.json")


def test_the_page_of_results_has_the_figures_of_the_stored_evaluation(stored: Downstream) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    filled = evidence_tables.filled_page(page, evidence_tables.tables(stored, "id"))
    assert filled == page, "run benchmarks/evidence/table.py on it with --page docs/results.md"
    for name, target in stored.targets.items():
        for result in target.results.values():
            assert f"| {result.loss.mean:.3f}" in page, name


def test_the_stored_evaluation_is_what_its_trainings_losses_say(stored: Downstream) -> None:
    again = joining.judged(stored, joining.Trainings(EVIDENCE / "retraining"))
    for name, target in again.targets.items():
        known = stored.targets[name]
        assert len(target.contrasts) == len(known.contrasts)
        for found, expected in zip(target.contrasts, known.contrasts, strict=True):
            assert found.model_dump() == pytest.approx(expected.model_dump(), abs=1e-9), name
        for method, result in target.results.items():
            assert result.front == known.results[method].front, (name, method)
            assert result.loss.model_dump() == pytest.approx(
                known.results[method].loss.model_dump(), abs=1e-12
            )


Losses = dict[str, Float[np.ndarray, "seeds rows"]]


def _document(losses: Losses) -> Downstream:
    results, contrasts, judge = compare({n: [own] for n, own in losses.items()}, "random")
    target = TargetResult(rows=5, results=results, contrasts=contrasts, judge=judge)
    about = About(
        model="m", adapter=None, baseline="random", seeds=[0, 1], weighted=False, recipe={}
    )
    return Downstream(targets={"t": target}, overall=None, about=about)


def _stored_trainings(folder: Path, losses: Losses) -> joining.Trainings:
    """A shard a training, its rows out of order and one of them without a loss."""
    every = (own for each in losses.values() for own in each)
    for at, own in enumerate(every):
        order = np.random.default_rng(at).permutation(len(own) + 1)
        values = [None if row == len(own) else float(own[row]) for row in order]
        columns = {"test": ["t"] * len(values), "position": order, "loss": values}
        (folder / str(at)).mkdir()
        pq.write_table(pa.table(columns), folder / str(at) / "00000.parquet")
    return joining.Trainings(folder)


@pytest.fixture
def losses() -> Losses:
    rng = np.random.default_rng(0)
    shifts = {"untrained": 3.0, "random": 2.0, "a": 1.0, "b": 0.5, "full": 0.25}
    made = {n: rng.normal(size=(2, 5)) + shift for n, shift in shifts.items()}
    made["untrained"][1] = made["untrained"][0]
    return made


def test_joined_evaluations_are_as_one_that_had_all_selections(
    losses: Losses, tmp_path: Path
) -> None:
    parts = [
        _document({n: losses[n] for n in names.split()})
        for names in ("untrained random a", "untrained random b full")
    ]
    found = joining.judged(joining.joined(*parts), _stored_trainings(tmp_path, losses))
    whole = _document(losses)
    assert found.model_dump(exclude={"targets"}) == whole.model_dump(exclude={"targets"})
    target, expected = found.targets["t"], whole.targets["t"]
    for name, result in expected.results.items():
        assert target.results[name].by_seed == pytest.approx(result.by_seed, abs=1e-12)
        assert target.results[name].loss.error == pytest.approx(result.loss.error, abs=1e-12)
        assert (target.results[name].gain is None) == (result.gain is None), "judged before joined"
    pairs = [[(c.of, c.against) for c in each.contrasts] for each in (target, expected)]
    assert pairs[0] == pairs[1], "differences between the two runs' selections are lost"
    for own, other in zip(target.contrasts, expected.contrasts, strict=True):
        assert own.model_dump() == pytest.approx(other.model_dump(), abs=1e-9)


def test_evaluations_by_two_judges_are_not_joined(losses: Losses) -> None:
    first = _document(losses)
    with pytest.raises(ValueError, match="t: untrained has losses"):
        joining.joined(first, _document({n: each + 0.1 for n, each in losses.items()}))
    about = first.about.model_copy(update={"seeds": [3, 4]})
    with pytest.raises(ValueError, match="not one judge"):
        joining.joined(first, first.model_copy(update={"about": about}))


def test_losses_that_no_training_has_are_refused(losses: Losses, tmp_path: Path) -> None:
    trainings = _stored_trainings(tmp_path, {n: losses[n] for n in ("untrained", "random")})
    with pytest.raises(ValueError, match="t: 0 trainings have the mean loss"):
        joining.judged(_document(losses), trainings)


def test_tables_of_one_seed_have_differences_without_an_interval() -> None:
    losses = {n: [np.array([[1.0, 2.0]]) + i] for i, n in enumerate(("untrained", "random", "id"))}
    results, contrasts, judge = compare(losses, "random")
    target = TargetResult(rows=2, results=results, contrasts=contrasts, judge=judge)
    assert "| +1.000 |" in evidence_tables.loss_table(target, "random")
    assert "| +1.000 |" in evidence_tables.contrast_table({"t": target}, "id")
