"""Scores of whole runs about an optimiser's step, against autograd by row and torch's own step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_training import Trained, changes_of, train_whole
from test_scores_of_runs import Oracle, tokens_and_labels
from tiny_run import Runner, Setup, manifest_of, messages_of, score_column, scores_of, tiny_config

from influence.one_process import run_select

TARGETS = ("sums", "mixed/x", "mixed/y")


@pytest.fixture(scope="module")
def full(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_whole(setup, str(tmp_path_factory.mktemp("full")))


class Gradients:
    """Each row's gradient by batch-of-one autograd, and a beside it, both flat, in float64."""

    def __init__(self, trained: Trained, wanted: str) -> None:
        self.rows = Oracle(trained.setup)
        self._model = trained.model
        named = [(n, p) for n, p in trained.model.named_parameters() if wanted in n]
        self._weights = [p.requires_grad_(True) for _name, p in named]
        self.a = torch.cat([trained.scale[name].flatten() for name, _p in named])

    def of(self, row: dict[str, Any]) -> torch.Tensor:
        ids, labels = tokens_and_labels(messages_of(row), self.rows.tokenizer)
        loss = self._model(input_ids=ids, labels=labels).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self._weights)])

    def scores(self, *, normalize: bool) -> dict[str, list[float]]:
        """<a * g_i, g_T>, with unit rows and targets or without."""

        def unit(g: torch.Tensor) -> torch.Tensor:
            return g / g.norm() if normalize else g

        rows = [unit(self.a * self.of(row)) for row in self.rows.rows.values()]
        mixed = self.rows.targets["mixed"]
        groups = {
            "sums": self.rows.targets["sums"],
            "mixed/x": [row for row in mixed if row["family"] == "x"],
            "mixed/y": [row for row in mixed if row["family"] == "y"],
        }
        found = {}
        for name, members in groups.items():
            mean = torch.stack([unit(self.of(row)) for row in members]).mean(0)
            found[name] = [float(row @ mean) for row in rows]
        return found


@pytest.fixture(scope="module")
def of_lora(lora: Trained) -> Gradients:
    return Gradients(lora, "lora_")


def run_of(run: Runner, trained: Trained, kind: str = "adamw", **changes: Any) -> str:
    return run(**changes_of(trained, kind, **changes))


def assert_scores(directory: str, gradients: Gradients, wanted: dict[str, list], rtol=2e-4) -> None:
    ids = scores_of(directory).column("id").to_pylist()
    where = [ids.index(each) for each in gradients.rows.rows]
    for name in TARGETS:
        found = score_column(directory, f"score.{name}")[where]
        size = float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(
            found,
            wanted[name],
            rtol=rtol,
            atol=rtol * size,
            err_msg=f"score.{name}: a is left out, on both sides, or after the norm was taken",
        )


#: Wide enough that both sides and every slot are kept: a sketch without noise. The layers of the
#: adapter are small enough that `layerwise` keeps them whole as well.
WHOLE_SKETCH = {"gradients__side": 128, "gradients__dim": 16384}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("projection", ["exact", "none", "kronecker", "layerwise"])
def test_scores_are_products_with_the_scaled_gradients(
    projection: str, normalize: bool, run: Runner, lora: Trained, of_lora: Gradients
) -> None:
    changes: dict[str, Any] = {"gradients__projection": projection}
    changes |= WHOLE_SKETCH if projection == "kronecker" else {}
    directory = run_of(run, lora, method="exact", gradients__normalize=normalize, **changes)
    wanted = of_lora.scores(normalize=normalize)
    assert_scores(directory, of_lora, wanted)


@pytest.mark.parametrize("normalize", [True, False])
def test_full_parameters_are_scaled_too(normalize: bool, full: Trained, tmp_path: Path) -> None:
    gradients = Gradients(full, "_proj")
    changes = changes_of(full, method="exact", gradients__projection="exact")
    config = tiny_config(full.setup, tmp_path / "run", gradients__normalize=normalize, **changes)
    run_select(config, quiet=True)
    assert_scores(config.run, gradients, gradients.scores(normalize=normalize))
    stage = "inner_products" if normalize else "target_vectors"
    notes = " ".join(manifest_of(config.run).stages[stage].notes)
    count = sum("_proj" in name for name in full.scale)
    assert f"moments of {count} of {count} attributed" in notes, "nothing says what is covered"
    assert f"{len(full.scale) - count} others have moments" in notes


def test_a_narrow_sketch_is_right_in_the_mean(
    run: Runner, lora: Trained, of_lora: Gradients
) -> None:
    """Unnormalised: unbiased, so the mean over seeds approaches the truth as its noise says."""
    wanted = np.asarray(of_lora.scores(normalize=False)["sums"])
    found = []
    for seed in range(8):
        directory = run_of(
            run,
            lora,
            method="exact",
            gradients__normalize=False,
            gradients__side=16,
            gradients__dim=512,
            seed=seed,
        )
        ids = scores_of(directory).column("id").to_pylist()
        where = [ids.index(each) for each in of_lora.rows.rows]
        found.append(score_column(directory, "score.sums")[where])
    mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / 8**0.5
    off = np.abs(mean - wanted) / error
    assert np.median(off) < 1.5, f"biased: {off.round(1)} standard errors from the truth"
    assert off.max() < 6, f"biased in some rows: {off.round(1)} standard errors from the truth"


@pytest.mark.parametrize("normalize", [True, False])
def test_landmarks_have_the_scores_of_the_step(
    normalize: bool, run: Runner, lora: Trained, of_lora: Gradients
) -> None:
    """With every row a landmark, every score is an exact one."""
    own: dict[str, Any] = {**WHOLE_SKETCH, "gradients__normalize": normalize}
    directory = run_of(run, lora, landmarks__count=64, **own)
    assert_scores(directory, of_lora, of_lora.scores(normalize=normalize))
