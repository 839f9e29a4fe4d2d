"""Certified runs from end to end on a tiny model: against the exact method, killed, resumed."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import (
    N_SCORED,
    Runner,
    Setup,
    assert_same_results,
    manifest_of,
    scores_of,
    selection_of,
    shards_in,
    tiny_config,
)

from influence import one_process
from influence.config import Config
from influence.errors import InterruptedRunError
from influence.local import local_execute
from influence.observer import Observer
from influence.plan import make_plan
from influence.units import Bundle
from influence.worker import UnitResult

CERTIFIED = {
    "landmarks__choose": "certified",
    "landmarks__count": 4096,
    "landmarks__initial": 12,
    "landmarks__audit": 6,
    "replicas__gradient_rows_per_shard": 4,
}


def _fidelity(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "fidelity.json").read_text())


@pytest.mark.parametrize("projection", ["kronecker", "exact"])
@pytest.mark.parametrize("combine", ["mean", "round_robin"])
def test_a_recall_of_one_selects_what_all_exact_scores_select(
    run: Runner, projection: str, combine: str
) -> None:
    same = {"gradients__projection": projection, "selection__combine": combine}
    certified = run(**CERTIFIED, **same, landmarks__recall=1.0)
    truth = run(method="exact", **same)
    one, other = selection_of(certified), selection_of(truth)
    assert [row["id"] for row in one] == [row["id"] for row in other], (
        "a row that all exact scores select was missed although a recall of 1 was asked for"
    )
    for name in ("influence_score", "influence_weight"):
        np.testing.assert_allclose(
            [row[name] for row in one], [row[name] for row in other], rtol=1e-4, atol=1e-6
        )
    fidelity = _fidelity(certified)
    assert fidelity["recall"]["low"] == 1.0
    assert fidelity["estimated"] == 0


def test_the_certificate_counts_every_exact_gradient(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run", **CERTIFIED, landmarks__recall=0.2)
    one_process.run_select(config, quiet=True)
    directory = config.run
    fidelity, rows = _fidelity(directory), scores_of(directory).to_pylist()
    exact = sum(row["exact"] for row in rows)
    assert exact < N_SCORED, "too easy: everything was computed"
    assert fidelity["recall"]["exact_gradients"] == fidelity["landmarks"] == exact
    assert all(row["exact"] for row in rows if row["weight"] > 0), "an estimate was selected"
    assert fidelity["rounds"][0]["exact"] == 12
    assert fidelity["rounds"][-1]["exact"] == exact
    assert fidelity["recall"]["low"] >= 0.2
    assert 0 <= fidelity["recall"]["audit_low"] <= 1
    assert sum(each["rows"] for each in fidelity["reliability"]) == exact - 12
    for name, target in fidelity["targets"].items():
        assert target["recall"]["exact_gradients"] == exact, name
        assert target["recall"]["audit_low"] is not None, name
    page = Path(directory, "report.html").read_text()
    assert "Rounds" in page
    assert "Was the regression right" in page
    computed = manifest_of(directory).stages["gradients"]
    assert not Path(directory, "scoring").exists(), "score shards outlive the run"
    assert computed.rows == exact + 11, "rows were computed that the certificate does not count"


def test_what_the_rounds_took_is_told_beside_exact_scores_of_all(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line_of(name: str, **changes: Any) -> tuple[str, int]:
        config = tiny_config(setup, tmp_path / name, **{**CERTIFIED, **changes})
        one_process.run_select(config)
        (line,) = manifest_of(config.run).stages["regression"].notes
        assert line in capsys.readouterr().err, "it is in the manifest alone"
        assert line.split(" (on")[0] in html.unescape(Path(config.run, "report.html").read_text())
        return line, sum(scores_of(config.run)["exact"].to_pylist())

    dear, exact = line_of("dear", landmarks__recall=1.0)
    few, fewer = line_of("few", landmarks__count=16)
    assert fewer == 16 < exact, "the rounds do not differ: test too weak"
    shares = []
    for line, rows in ((dear, exact), (few, fewer)):
        assert line.startswith(f"certified: {rows:,} of {N_SCORED:,} candidates got exact scores")
        of_all = float(line.split("FLOP, ")[1].split()[0])
        assert ("`method: exact`" in line) == (of_all >= 1)
        shares.append(of_all - rows / N_SCORED)  # the embeddings', the same for both
    assert shares[0] == pytest.approx(shares[1], abs=0.011), "exact rows have no fixed price"
    assert shares[0] > 0, "the embeddings cost nothing"


def test_a_budget_of_gradients_that_is_too_small_is_said(run: Runner) -> None:
    directory = run(**{**CERTIFIED, "landmarks__count": 16}, landmarks__recall=1.0)
    fidelity, rows = _fidelity(directory), scores_of(directory).to_pylist()
    assert sum(row["exact"] for row in rows) <= 16
    estimated = sum(not row["exact"] for row in rows if row["weight"] > 0)
    assert fidelity["estimated"] == estimated > 0
    assert fidelity["recall"]["audit_low"] is None
    assert "have a predicted score" in Path(directory, "report.html").read_text()


def test_a_recall_that_cannot_be_certified_is_said_before_the_work(
    setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**CERTIFIED, "landmarks__count": 16, "selection__budget": 40}
    few = tiny_config(setup, tmp_path / "run", **changes)
    (note,) = (note for note in make_plan(few).notes if note.startswith("landmarks.count"))
    one_process.run_select(few)
    said = capsys.readouterr().err
    assert note in said, "the run says nothing"
    assert said.index(note) < said.index("shards to compute: gradients"), "said too late"
    assert "no recall above 40%" in note
    assert _fidelity(few.run)["recall"]["high"] <= 16 / 40, "more was certified than is exact"
    enough = tiny_config(setup, tmp_path / "enough", **{**changes, "landmarks__count": 38})
    assert not any(note.startswith("landmarks.count") for note in make_plan(enough).notes)


def _interrupted_after(results: int) -> Callable[[Config, Observer], Any]:
    """An executor that stops the job once so many shards of gradients are committed."""

    def make(config: Config, observer: Observer) -> Any:
        execute, left = local_execute(config, observer), [results]

        def run_some(
            bundles: Sequence[Bundle],
            on_result: Callable[[Bundle, list[UnitResult]], None],
            on_failure: Callable[[Bundle, int, str], None],
        ) -> None:
            def counted(bundle: Bundle, found: list[UnitResult]) -> None:
                on_result(bundle, found)
                left[0] -= any(unit.stage == "gradients" for unit in bundle.units)
                if left[0] == 0:
                    raise InterruptedRunError("stopped by the test")

            execute(bundles, counted, on_failure)

        return run_some

    return make


def test_killed_in_the_middle_of_every_round_it_ends_with_the_same_bytes(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**CERTIFIED, "landmarks__recall": 0.9, "replicas__gradient_rows_per_shard": 2}
    plain = tiny_config(setup, tmp_path / "plain", **changes)
    one_process.run_select(plain, quiet=True)
    planned = {key for stage in manifest_of(plain.run).stages.values() for key in stage.planned}
    config = tiny_config(setup, tmp_path / "run", **changes)
    stops, computed = 0, 0
    monkeypatch.setattr(one_process, "local_execute", _interrupted_after(5))
    while True:
        before = shards_in(config.cache_url)
        try:
            one_process.run_select(config, quiet=True)
        except InterruptedRunError:
            stops += 1
            made = sum(s.computed for s in manifest_of(config.run).stages.values())
            assert made == len(shards_in(config.cache_url) - before), "a shard was computed twice"
            computed += made
        else:
            break
    computed += sum(s.computed for s in manifest_of(config.run).stages.values())
    assert stops >= 3, "too few stops: the rounds were not interrupted"
    assert computed == len(planned) == len(shards_in(config.cache_url))
    assert_same_results(plain.run, config.run, "a resumed round asked for other rows")


def test_a_second_run_on_the_same_cache_computes_nothing(setup: Setup, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = tiny_config(setup, tmp_path / "one", cache=cache, **CERTIFIED)
    one_process.run_select(first, quiet=True)
    second = tiny_config(setup, tmp_path / "two", cache=cache, **CERTIFIED)
    one_process.run_select(second, quiet=True)
    assert sum(stage.computed for stage in manifest_of(second.run).stages.values()) == 0
    assert_same_results(first.run, second.run, "shards of a cache give other numbers")
