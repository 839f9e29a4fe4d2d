"""Whole runs of the second order against the dense programme of every row's own gradient."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in2core_runs import run_cut
from optimizer_training import Trained
from second_order_oracle import Dense, solved
from tiny_run import (
    Runner,
    Setup,
    assert_same_results,
    manifest_of,
    score_column,
    scores_of,
    selection_of,
    tiny_config,
)

from influence.errors import InputError
from influence.local import local_execute
from influence.one_process import run_select
from influence.pipeline import prepare, select
from influence.plan import make_plan
from influence.progress import Progress
from influence.reducer import Reducer
from influence.report import build_report
from influence.resume import claim_run
from influence.summary import objective_line

ROWS, BUDGET = 20, 6
ALL = {"count": 100, "choose": "uniform"}
# Unprojected gradients: nothing is sketched, so everything is exact but for float32.
BASE: dict[str, Any] = {
    "data__limit": ROWS,
    "selection__budget": BUDGET,
    "gradients__projection": "none",
    "landmarks": ALL,
}


@dataclass(frozen=True)
class Case:
    """A model and an optimiser's step, and an eta at which curvature matters."""

    trained: Trained | None
    eta: float

    def changes(self, curvature: str, method: str = "exact", **more: Any) -> dict[str, Any]:
        weights = {"order": 2, "eta": self.eta, "curvature": curvature, "directions": ROWS}
        own: dict[str, Any] = {}
        if self.trained is not None:
            own = {**self.trained.changes, "optimizer__state": self.trained.checkpoint}
            own["optimizer__kind"] = "adamw"
        return {**BASE, **own, "method": method, "weights": weights, **more}


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def case(request: pytest.FixtureRequest, lora: Trained) -> Case:
    return Case(None, 0.2) if request.param == "sgd" else Case(lora, 1e-3)


@pytest.fixture(scope="module")
def dense(case: Case, setup: Setup, run: Runner) -> Dense:
    return Dense(setup, scored_ids(run(**case.changes("fisher"))), case.trained)


def objective_of(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "fidelity.json").read_text())["objective"]


def scored_ids(run: str) -> list[str]:
    table = scores_of(run).select(["id", "reason"]).to_pylist()
    return [row["id"] for row in table if row["reason"] is None]


def weights_of(run: str) -> np.ndarray:
    reasons = scores_of(run).column("reason").to_pylist()
    return score_column(run, "weight")[[reason is None for reason in reasons]]


def nonnegative(S: np.ndarray) -> np.ndarray:
    """The nearest positive semidefinite matrix: the programme leaves negative curvature out."""
    values, vectors = np.linalg.eigh((S + S.T) / 2)
    return (vectors * values.clip(min=0)) @ vectors.T


def check(found: str, dense: Dense, kind: str, eta: float) -> None:
    """The run's weights are those of the dense programme at the lambda that it reports."""
    n, told, weights = len(dense.A), objective_of(found), weights_of(found)
    # An orthonormal basis of the rows' span: a curvature of the parameters, not of the rows.
    left, sizes, V = np.linalg.svd(dense.A, full_matrices=False)
    every = np.concatenate([V, dense.b[None]])
    S = dense.fisher(every) if kind == "fisher" else every @ dense.hessian(every).T
    Z = left * sizes
    clipped = Z @ nonnegative(S[:-1, :-1]) @ Z.T / n
    Q, q = Z @ S[:-1, :-1] @ Z.T / n, Z @ S[:-1, -1]
    expected = solved(dense.p - eta * q, clipped, eta, told["lam"])
    message = "the weights are not the optimum of the dense programme"
    np.testing.assert_allclose(weights, expected, rtol=2e-3, atol=2e-3, err_msg=message)
    assert np.count_nonzero(weights) == told["support"] == told["budget"] == BUDGET
    assert told["kkt"] < 1e-8, "the programme was not solved"
    linear = solved(dense.p, 0 * Q, eta, told["lam"])
    assert np.abs(linear - expected).max() > 0.1, "curvature plays no part: the test shows nothing"
    gradient = float(dense.b @ (dense.shares @ dense.G))
    first = -eta * (dense.p @ weights / n + gradient)
    second = first + eta**2 * (q @ weights / n + weights @ Q @ weights / (2 * n) + S[-1, -1] / 2)
    np.testing.assert_allclose(told["predicted_first"], first, rtol=1e-3)
    np.testing.assert_allclose(told["predicted_second"], second, rtol=1e-3)
    np.testing.assert_allclose(told["offset_gradient"], gradient, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("curvature", ["fisher", "hvp"])
@pytest.mark.parametrize("method", ["exact", "influence_distillation"])
def test_the_weights_are_those_of_the_dense_programme(
    curvature: str, method: str, case: Case, run: Runner, dense: Dense
) -> None:
    """With every row a landmark the regression has nothing to predict."""
    found = run(**case.changes(curvature, method))
    check(found, dense, curvature, case.eta)
    score = score_column(found, "score")
    message = "the score is not p: <a * g_i, g_T> with the mean target gradient"
    np.testing.assert_allclose(
        score[~np.isnan(score)],
        dense.p,
        rtol=1e-3,
        atol=1e-4 * np.abs(dense.p).max(),
        err_msg=message,
    )


def test_products_with_every_target_row_need_no_sketch(run: Runner, setup: Setup) -> None:
    """Exact inner products (per: row) are the same programme as whole gradients."""
    targets = {"sums": setup.targets["sums"]}
    case = Case(None, 0.2)
    whole, exact = (
        run(**case.changes("fisher", targets=targets, gradients__projection=projection))
        for projection in ("none", "exact")
    )
    np.testing.assert_allclose(weights_of(whole), weights_of(exact), rtol=1e-3, atol=1e-3)


def test_the_programme_does_not_depend_on_which_columns_scores_have(
    run: Runner, setup: Setup
) -> None:
    """Products with every target row are predicted alike, as scores or beside the mean's."""
    few = {"landmarks": {"count": 12, "choose": "uniform"}}
    by_row, by_group = (
        run(
            **Case(None, 0.2).changes("fisher", "influence_distillation", **few)
            | {"targets": {"sums": {**setup.targets["sums"], "per": per}}}
        )
        for per in ("row", "group")
    )
    assert not score_column(by_row, "exact").all(), "nothing was predicted: the test shows nothing"
    message = "columns of the regression were mixed up"
    np.testing.assert_allclose(
        weights_of(by_row), weights_of(by_group), rtol=1e-4, atol=1e-4, err_msg=message
    )
    assert objective_of(by_row)["directions"] == objective_of(by_group)["directions"] == 5


def test_one_target_row_is_refused_before_anything_is_computed(
    setup: Setup, tmp_path: Path
) -> None:
    """One gradient has no covariance; its plan says so, too."""
    targets = {"sums": {**setup.targets["sums"], "limit": 1}}
    config = tiny_config(
        setup, tmp_path / "run", **Case(None, 0.2).changes("fisher", targets=targets)
    )
    for what in (make_plan, lambda config: run_select(config, quiet=True)):
        with pytest.raises(InputError, match=r"weights.curvature: fisher .* 1 target row .*hvp"):
            what(config)
    assert not Path(config.cache_url, "gradients").exists(), "gradients were computed first"


def test_the_selection_is_ordered_by_weight_and_the_path_is_told(run: Runner) -> None:
    found = run(**Case(None, 0.2).changes("fisher"))
    weights = [row["influence_weight"] for row in selection_of(found)]
    assert weights == sorted(weights, reverse=True), "ranks do not follow the weights"
    told = objective_of(found)
    path, n = told["path"], len(scored_ids(found))
    assert [point["budget"] for point in path] == sorted({1, 2, 3, 6, 12, 24, n} - {24} | {n})
    assert manifest_of(found).objective is not None, "the manifest says nothing of the objective"
    line = objective_line(json.loads(Path(found, "fidelity.json").read_text()))
    assert line is not None
    assert f"{BUDGET} rows have weight" in line
    own = next(point for point in path if point["budget"] == BUDGET)
    assert own["predicted_second"] == told["predicted_second"]
    assert path[-1]["lam"] is None
    assert path[-1]["effective_rows"] == pytest.approx(n)


def test_a_run_goes_on_where_it_was_cut_and_order_of_arrival_changes_no_bit(
    setup: Setup, tmp_path: Path
) -> None:
    case = Case(None, 0.2)
    few = {"order": 2, "eta": 0.2, "curvature": "hvp", "directions": 4}
    changes = case.changes("hvp", "influence_distillation") | {"weights": few}
    changes |= {"gradients__projection": "kronecker", "landmarks": {**ALL, "count": 12}}
    cut, backwards = (
        tiny_config(setup, tmp_path / name, cache=str(tmp_path / f"{name}-cache"), **changes)
        for name in ("cut", "backwards")
    )
    run_cut(cut, 1, "hessian_products")  # one pass of the two targets'
    run_select(cut, quiet=True)
    stages = manifest_of(cut.run).stages
    assert stages["directions"].computed == 0, "directions were made twice"
    assert stages["hessian_products"].reused == 4, "products of the first run were not used"

    claim_run(backwards)
    job = prepare(backwards, Progress(quiet=True))
    execute = local_execute(backwards, job.watch)
    select(job, lambda bundles, *rest: execute([*bundles][::-1], *rest), Reducer(backwards))
    assert_same_results(cut.run, backwards.run, "the order of arrival counts")
    assert "Second order" in Path(build_report(cut.run)).read_text()
