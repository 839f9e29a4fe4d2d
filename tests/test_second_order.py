"""Whole runs of the second order against the dense programme of every row's own gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from second_order_oracle import Dense, solved
from tiny_run import N_SCORED, Runner, Setup, score_column, scores_of, selection_of

ETA = 0.05
FISHER: dict[str, Any] = {"weights": {"order": 2, "eta": ETA}}
# Whole gradients of LoRA factors: nothing is sketched, so everything is exact but for float32.
WHOLE: dict[str, Any] = {"gradients": {"projection": "none", "parameters": "linear"}}


def objective_of(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "fidelity.json").read_text())["objective"]


def scored_ids(run: str) -> list[str]:
    table = scores_of(run)
    reasons = table.column("reason").to_pylist()
    ids = table.column("id").to_pylist()
    return [each for each, reason in zip(ids, reasons, strict=True) if reason is None]


def weights_of(run: str) -> np.ndarray:
    table = scores_of(run)
    kept = [reason is None for reason in table.column("reason").to_pylist()]
    return score_column(run, "weight")[kept]


@pytest.fixture(scope="module")
def dense(setup: Setup, run: Runner) -> Dense:
    return Dense(setup, scored_ids(run(method="exact", **FISHER, **WHOLE)))


def check_weights(found: str, dense: Dense, AHA: np.ndarray, drift: np.ndarray | float = 0.0):
    """The run's weights are those of the dense programme at the lambda that it reports."""
    n, told = len(dense.A), objective_of(found)
    assert n == N_SCORED
    weights = weights_of(found)
    Q = AHA / n
    expected = solved(dense.p - ETA * drift, Q, ETA, told["lam"])
    message = "the weights are not the optimum of the dense programme"
    np.testing.assert_allclose(weights, expected, rtol=2e-3, atol=2e-3, err_msg=message)
    assert np.count_nonzero(weights) == told["support"] == told["budget"] == 10
    assert told["kkt"] < 1e-8, "the programme was not solved"
    first = -ETA * dense.p @ weights / n
    second = first + ETA**2 * (drift @ weights / n if np.ndim(drift) else 0.0)
    second += ETA**2 * (weights @ Q @ weights) / (2 * n)
    np.testing.assert_allclose(told["predicted_first"], first, rtol=1e-3)
    np.testing.assert_allclose(told["predicted_second"], second, rtol=1e-3)
    linear = solved(dense.p, 0 * Q, ETA, told["lam"])
    assert np.abs(linear - expected).max() > 0.1, "curvature plays no part: the test shows nothing"


def test_fisher_with_whole_gradients_is_the_dense_programme(run: Runner, dense: Dense):
    found = run(method="exact", **FISHER, **WHOLE)
    check_weights(found, dense, dense.fisher())
    score = score_column(found, "score")
    np.testing.assert_allclose(score[~np.isnan(score)], dense.p, rtol=1e-4, atol=1e-6)


def test_all_rows_as_landmarks_give_the_weights_of_exact_gradients(run: Runner, dense: Dense):
    landmarks = {"count": 500, "choose": "uniform"}
    found = run(landmarks=landmarks, **FISHER, **WHOLE)
    check_weights(found, dense, dense.fisher())


def test_the_selection_is_ordered_by_weight_and_the_path_is_told(run: Runner):
    found = run(method="exact", **FISHER, **WHOLE)
    weights = [row["influence_weight"] for row in selection_of(found)]
    assert weights == sorted(weights, reverse=True), "ranks do not follow the weights"
    told = objective_of(found)
    path = told["path"]
    assert [point["budget"] for point in path] == [1, 2, 5, 10, 20, 40, 64]
    own = path[3]
    assert own["predicted_second"] == told["predicted_second"]
    assert path[-1]["lam"] is None
    assert path[-1]["effective_rows"] == pytest.approx(N_SCORED)
    gains = [point["predicted_first"] for point in path]
    assert gains == sorted(gains), "more rows are expected to do less in first order"


HVP: dict[str, Any] = {
    "weights": {"order": 2, "eta": ETA, "curvature": "hvp", "directions": N_SCORED},
    "landmarks": {"count": 500, "choose": "uniform"},
}


@pytest.fixture(scope="module")
def curved(dense: Dense) -> np.ndarray:
    """A H A' without its negative part, which the programme leaves out."""
    AHA = dense.A @ dense.hessian(dense.A).T
    # The nearest positive semidefinite H in the span of A's rows, not of A H A' itself.
    left, sizes, _right = np.linalg.svd(dense.A, full_matrices=False)
    S = (left / sizes).T @ ((AHA + AHA.T) / 2) @ (left / sizes)
    values, vectors = np.linalg.eigh(S)
    root = (left * sizes) @ vectors * np.sqrt(values.clip(min=0))
    return root @ root.T


@pytest.mark.parametrize("method", ["exact", "influence_distillation"])
def test_hessian_products_along_all_directions_are_the_dense_programme(
    method: str, run: Runner, dense: Dense, curved: np.ndarray
):
    found = run(method=method, **HVP, **WHOLE)
    told = objective_of(found)
    weights = weights_of(found)
    expected = solved(dense.p, curved / N_SCORED, ETA, told["lam"])
    np.testing.assert_allclose(weights, expected, rtol=2e-3, atol=2e-3)
    assert told["uncovered"] < 1e-6
    assert told["asymmetry"] < 1e-4
