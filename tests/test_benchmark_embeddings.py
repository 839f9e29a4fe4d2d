"""The embeddings' benchmark: its judgement against refitting by hand, and its rounds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import embeddings

from influence import landmarks
from influence.kernels import unit_rows


def test_certified_and_true_spearman_are_of_the_rows_they_say() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 5))
    Y = np.stack([X[:, 0] + 0.3 * rng.standard_normal(60), rng.standard_normal(60)], axis=1)
    chosen = np.sort(rng.choice(60, 30, replace=False))
    found = embeddings.judge(X, Y, chosen, ["a", "b"], 0.1)
    units = unit_rows(X)
    rest = np.setdiff1d(np.arange(60), chosen)
    predicted = landmarks.predict(landmarks.fit(units[chosen], Y[chosen]), units[rest])
    for column, name in enumerate("ab"):
        rho = float(spearmanr(predicted[:, column], Y[rest, column])[0])  # pyright: ignore
        assert found[name]["true"] == pytest.approx(rho, abs=1e-12), "judged by the landmarks"
    # Leave-one-out by refitting without the landmark, bandwidth held.
    alone = []
    whole = landmarks.fit(units[chosen], Y[chosen])
    kernel = landmarks.KERNELS["rbf"]
    for i in range(30):
        kept = np.delete(chosen, i)
        gram = kernel(units[kept], units[kept], whole.bandwidth) + whole.ridge * np.eye(29)
        mean = Y[kept].mean(axis=0)
        alpha = np.linalg.solve(gram, Y[kept] - mean)
        alone.append(kernel(units[chosen[i : i + 1]], units[kept], whole.bandwidth) @ alpha + mean)
    alone = np.concatenate(alone)
    rho = float(spearmanr(alone[:, 0], Y[chosen, 0])[0])  # pyright: ignore
    assert found["a"]["certified"]["value"] == pytest.approx(rho, abs=1e-9), "not leave-one-out"
    assert found["a"]["certified"]["value"] > found["b"]["certified"]["value"] + 0.3


def test_every_setting_runs_once_in_every_round() -> None:
    calls: list[str] = []
    rows: Any = [SimpleNamespace(n_tokens=5), SimpleNamespace(n_tokens=7)]

    def run(name: str) -> Any:
        def once(given: Any) -> None:
            assert given is rows
            calls.append(name)

        return once

    names = ["p", "q", "r"]
    found = embeddings.speeds({name: run(name) for name in names}, rows, 4)
    rounds = [calls[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(order) == names for order in rounds), "a round misses a setting"
    assert len({tuple(order) for order in rounds}) > 1, "the order is the same in every round"
    assert all(len(values) == 4 for values in found.values())
