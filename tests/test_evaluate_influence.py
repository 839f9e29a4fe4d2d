"""`influence evaluate` on DataInf itself: a selection as a group, and the inverse it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in2core_runs import gradients_of
from tiny_run import N_SCORED, Runner, Setup, manifest_of, scores_of, tiny_config

from influence.config import Config
from influence.datainf import DAMPING
from influence.errors import InputError
from influence.inverse_distance import inverse_distance
from influence.one_process import run_evaluate, run_select
from influence.pipeline import prepare
from influence.progress import Progress

BUDGET = 12


@pytest.fixture(scope="module")
def evaluated(setup: Setup, adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose selection was evaluated as a group, and DataInf on all of its rows."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = tiny_config(
        setup,
        folder / "run",
        cache=str(folder / "cache"),
        method="in2core",
        reference__adapter=adapter,
        gradients__projection="none",
        selection={"budget": BUDGET, "combine": "mean"},
        evaluation={"group_influence": {}, "exact_inverse": {"rows": 1000}},
    )
    run_select(config, quiet=True)
    run_evaluate(config, quiet=True)
    return config


def result_of(config: Config, name: str) -> dict[str, Any]:
    return json.loads(Path(config.run, "evaluation.json").read_text())[name]


def gradients(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Any]]:
    """(gradients of the scored rows, which of them are selected, those of all columns, layers)."""
    job = prepare(config, Progress(quiet=True))
    manifest, table = manifest_of(config.run), scores_of(config.run)
    reasons, weights = table.column("reason").to_pylist(), table.column("weight").to_pylist()
    rows, chosen, where, blocks = [], [], 0, []
    for file in job.files:
        own = gradients_of(config.cache_url, manifest, file.content_hash, unit=False)
        blocks = own[-1][0]
        for row in range(file.rows):
            if reasons[where + row] is None:
                rows.append(own[row][0])
                chosen.append(weights[where + row] > 0)
        where += file.rows
    of_target = {}
    for name, (file,) in job.target_files.items():
        own = gradients_of(config.cache_url, manifest, file.content_hash, unit=False)
        of_target[name] = np.stack([own[row][0] for row in range(file.rows)])
    groups = [of_target["mixed"][place::2].mean(axis=0) for place in (0, 1)]
    V = np.concatenate([of_target["sums"], groups])
    return np.stack(rows).astype(np.float64), np.array(chosen), V.astype(np.float64), blocks


def test_the_selection_as_a_group_is_the_step_of_the_rows_that_are_left(evaluated: Config) -> None:
    G, chosen, V, blocks = gradients(evaluated)
    n, u, v, g = len(G), BUDGET, V[:5].mean(axis=0), G[chosen].mean(axis=0)
    assert (n, int(chosen.sum())) == (N_SCORED, u)
    members = second = 0.0
    for block in blocks:
        x = G[:, block.span]
        damping = DAMPING * np.square(x).sum(axis=1).mean() / block.size
        eye = damping * np.eye(block.length)
        inverses = np.stack([np.linalg.inv(eye + np.outer(row, row)) for row in x])
        of_all, of_rest = inverses.mean(axis=0), inverses[~chosen].mean(axis=0)
        members += u / n * v[block.span] @ of_all @ g[block.span]
        second += u / (n - u) * v[block.span] @ of_rest @ g[block.span]
    found = result_of(evaluated, "group_influence")
    effect = found["targets"]["sums"]
    assert effect["members"] == pytest.approx(members, rel=1e-3)
    assert effect["first"] == pytest.approx(members * n / (n - u), rel=1e-3)
    assert effect["second"] == pytest.approx(second, rel=1e-3)
    assert effect["members"] > 0, "what was selected is expected to harm"
    scores = scores_of(evaluated.run)
    summed = np.nansum(
        np.where(
            scores.column("weight").to_numpy() > 0, scores.column("score.sums").to_numpy(), 0.0
        )
    )
    assert effect["members"] == pytest.approx(summed / n, rel=1e-3), "not the sum of its members"
    assert set(found["targets"]) == {"sums", "mixed", "mixed/x", "mixed/y"}
    about = found["about"]
    assert (about["rows"], about["of"], about["without_gradient"]) == (u, n, 0)
    page = Path(evaluated.run, "report.html").read_text()
    section = page[page.index('id="evaluation"') : page.index('id="stages"')]
    assert "Group influence" in section
    assert "DataInf and the exact inverse" in section


def test_the_distance_is_that_of_the_gradients_in_the_cache(evaluated: Config) -> None:
    G, _, V, blocks = gradients(evaluated)
    found = result_of(evaluated, "exact_inverse")
    assert found["about"]["rows"] == N_SCORED
    assert len(found["layers"]) == len(blocks)
    norms = np.stack([np.linalg.norm(G[:, b.span], axis=1) for b in blocks], axis=1)
    expected = inverse_distance(*(torch.from_numpy(x) for x in (G, norms, V)), blocks)
    assert found["about"]["columns"] == len(V)
    assert found["spearman"] == pytest.approx(expected.spearman, abs=1e-3)
    assert found["scale"] == pytest.approx(expected.scale, rel=1e-3)
    for layer, mine in zip(found["layers"], expected.layers, strict=True):
        assert layer["name"] == mine.name
        assert layer["relative"] == pytest.approx(mine.relative, rel=1e-3)
        assert layer["cosine"] == pytest.approx(mine.cosine, abs=1e-3)
    assert found["scale"] > 1, "the average of inverses is larger than the inverse of the average"


def test_a_group_that_is_none_is_refused_by_name(
    setup: Setup, adapter: str, evaluated: Config, tmp_path: Path, run: Runner
) -> None:
    def refusal(**changes: Any) -> str:
        given = {
            "cache": evaluated.cache_url,
            "method": "in2core",
            "reference__adapter": adapter,
            "gradients__projection": "none",
            "evaluation__group_influence": {"run": evaluated.run},
        }
        made = len(list(tmp_path.iterdir()))
        config = tiny_config(setup, tmp_path / f"run{made}", **{**given, **changes})
        with pytest.raises(InputError) as caught:
            run_evaluate(config, quiet=True)
        return str(caught.value)

    text = refusal(evaluation__group_influence={})
    assert "evaluation.group_influence: " in text
    assert "has no selection yet" in text
    assert "selected from another pool (72 rows, here 50)" in refusal(data__limit=50)
    everything = run(method="random", selection__budget="100%")
    text = refusal(evaluation__group_influence={"run": everything})
    assert "selected all of the rows that can be scored" in text
