"""What an optimiser's step changes of fingerprints, stages, plans and pages, and what it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from optimizer_training import Trained, changes_of
from test_plan_runs import planned_and_run
from tiny_run import Runner, Setup, manifest_of, score_column, shards_in, tiny_config

from influence import storage
from influence.cache_use import use_of
from influence.errors import InputError
from influence.fingerprints import stage_fingerprints
from influence.one_process import run_select
from influence.optimizer_state import load_adam_state
from influence.replica import load_tokenizer
from influence.report import build_report
from influence.status import read_status, status_document
from influence.tokenization import template_fingerprint
from influence.vector_export import export_vectors


def _prints(trained: Trained, **changes: Any) -> dict[str, Any]:
    config = tiny_config(trained.setup, "run", **{**trained.changes, **changes})
    return stage_fingerprints(config, template_fingerprint(load_tokenizer(config.model)))


@pytest.mark.parametrize("kind", ["exact", "influence_distillation"])
def test_unnormalised_candidates_suit_every_optimiser(
    kind: str, lora: Trained, tmp_path: Path
) -> None:
    changes = {"method": kind, "gradients__normalize": False, "cache": str(tmp_path / "cache")}
    made = []
    for optimizer in ("sgd", "adamw"):
        options = changes_of(lora, optimizer, **changes)
        config = tiny_config(lora.setup, tmp_path / optimizer, **options)
        before = shards_in(config.cache_url)
        run_select(config, quiet=True)
        made.append({key.split("/")[0] for key in shards_in(config.cache_url) - before})
    assert "gradients" in made[0]
    assert "target_gradients" not in made[0], "gradient descent needs no stage for the targets"
    assert made[1] == {"target_gradients"}, "more than the targets' gradients was computed anew"
    found = manifest_of(str(tmp_path / "adamw")).stages
    assert found["gradients"].computed == 0
    assert any("AdamW after 3 steps" in note for note in found["target_gradients"].notes)
    assert not any("AdamW" in note for note in found["gradients"].notes), "a plain stage"
    scores = [score_column(str(tmp_path / each), "score.sums") for each in ("sgd", "adamw")]
    assert not np.allclose(*scores, equal_nan=True), "the optimiser changed nothing"


@pytest.mark.parametrize("normalize", [True, False])
def test_exact_products_are_those_of_the_optimiser(
    normalize: bool, lora: Trained, tmp_path: Path
) -> None:
    """With unit rows the targets' gradients stay as they are, without they carry a."""
    made = []
    for optimizer in ("sgd", "adamw"):
        options = changes_of(lora, optimizer, method="exact", cache=str(tmp_path / "cache"))
        options |= {"gradients__projection": "exact", "gradients__normalize": normalize}
        config = tiny_config(lora.setup, tmp_path / optimizer, **options)
        run_select(config, quiet=True)
        stages = manifest_of(config.run).stages
        made.append({name for name, record in stages.items() if record.computed})
    assert made[0] == {"catalogue", "contamination", "target_vectors", "inner_products"}
    again = {"inner_products"} | (set() if normalize else {"target_vectors"})
    assert made[1] == again, "products of another step were used, or too much was made anew"


def test_fingerprints_carry_the_optimiser_where_it_changes_numbers(
    lora: Trained, tmp_path: Path
) -> None:
    adamw = {"optimizer__kind": "adamw", "optimizer__state": lora.checkpoint}
    for normalize in (True, False):
        chosen = {"gradients__normalize": normalize}
        plain, scaled = _prints(lora, **chosen), _prints(lora, **chosen, **adamw)
        assert not any("optimizer" in value for p in plain.values() for value in p.values)
        assert plain.keys() == scaled.keys() - {"target_gradients"}
        sides = {"gradients": normalize, "target_vectors": not normalize, "embedding": False}
        for stage, differs in sides.items():
            same = scaled[stage].hex == plain[stage].hex
            assert same != differs, f"{stage}: carries the optimiser on the wrong side"
        own = scaled["target_gradients"]
        assert (own.hex == plain["gradients"].hex) == normalize, "the targets' side is the other"
    file = Path(shutil.copytree(lora.checkpoint, tmp_path / "moved"), "optimizer.pt")
    file = Path(shutil.move(file, tmp_path / "state.pt"))
    moved = {**adamw, "optimizer__state": str(file)}
    assert _prints(lora, **moved) == _prints(lora, **adamw), "the path of the state counts"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg_sq"] *= 2
    torch.save(state, file)
    assert _prints(lora, **moved) != _prints(lora, **adamw), "the state's content does not count"


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_counts_only_where_it_scales(nesterov: bool, lora: Trained, tmp_path: Path) -> None:
    """Momentum alone has b, which the first order does not ask for, and a = 1."""
    named = [p for name, p in lora.model.named_parameters() if "lora_" in name]
    own = [torch.nn.Parameter(p.detach().clone()) for p in named]
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9, nesterov=nesterov)
    for parameter in own:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = _prints(lora, optimizer__state=str(tmp_path), gradients__normalize=False)
    plain = _prints(lora, gradients__normalize=False)
    assert (found == plain) != nesterov, "SGD's scale is not what its settings say"
    options = {"method": "exact", "gradients__normalize": False, "cache": str(tmp_path / "cache")}
    scores = []
    for name, state in (("plain", None), ("moved", str(tmp_path))):
        changes = {**lora.changes, **options, "optimizer__state": state}
        config = tiny_config(lora.setup, tmp_path / name, **changes)
        run_select(config, quiet=True)
        scores.append(score_column(config.run, "score.sums"))
    factor = 1.9 if nesterov else 1.0
    np.testing.assert_allclose(
        scores[1],
        factor * scores[0],
        rtol=1e-5 if nesterov else 0,
        err_msg="a is 1 + momentum with Nesterov's, and otherwise the very same scores stand",
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"optimizer__kind": "adamw"}, r"optimizer\.state: null.*warmup: \{\}"),
        (
            {"optimizer__kind": "adamw", "method": "rds"},
            r"optimizer\.kind: adamw is for method influence_distillation or exact",
        ),
        ({"optimizer__kind": "adamw", "method": "in2core"}, r"optimizer\.kind: adamw is for"),
        ({"optimizer__state": "x", "method": "random"}, r"optimizer\.state: 'x' is for method"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(
    changes: dict[str, str], wanted: str, setup: Setup
) -> None:
    with pytest.raises(InputError, match=wanted):
        tiny_config(setup, "run", **changes)


def test_a_state_that_is_not_there_is_refused_before_anything_is_made(
    lora: Trained, tmp_path: Path
) -> None:
    changes = changes_of(lora, optimizer__state=str(tmp_path / "no"))
    with pytest.raises(InputError, match=r"optimizer\.state: .*no does not exist"):
        run_select(tiny_config(lora.setup, tmp_path / "run", **changes), quiet=True)
    assert not shards_in(tmp_path / "run" / "cache")


def test_a_state_in_an_object_store_is_the_same_one(lora: Trained, s3_url: str) -> None:
    file = Path(lora.checkpoint, "optimizer.pt")
    storage.put(f"{s3_url}/checkpoint/optimizer.pt", file.read_bytes())
    local = _prints(lora, optimizer__kind="adamw", optimizer__state=lora.checkpoint)
    expected = load_adam_state(lora.checkpoint, lora.model).exp_avg_sq
    for url in (f"{s3_url}/checkpoint", f"{s3_url}/checkpoint/optimizer.pt"):
        remote = _prints(lora, optimizer__kind="adamw", optimizer__state=url)
        assert remote == local, "where the state lies counts"
        moments = load_adam_state(url, lora.model).exp_avg_sq
        assert all(torch.equal(moments[name], v) for name, v in expected.items())
    with pytest.raises(InputError, match="neither an object nor a folder"):
        load_adam_state(f"{s3_url}/nothing", lora.model)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("projection", ["kronecker", "exact"])
def test_a_plan_and_the_cache_know_the_targets_stage(
    projection: str, normalize: bool, lora: Trained, tmp_path: Path
) -> None:
    options = {"gradients__projection": projection, "gradients__normalize": normalize}
    config = tiny_config(lora.setup, tmp_path / "run", **changes_of(lora, **options))
    plan = planned_and_run(config)
    assert ("target_gradients" in plan.work.stages) == (projection != "exact")
    assert plan.memory is not None
    assert plan.memory.optimizer == sum(4 * scale.numel() for scale in lora.scale.values())
    places = {tuple(key.split("/")[:2]) for key in shards_in(config.cache_url)}
    assert places <= use_of(config.run, config.cache_url).places.keys(), "prune would remove some"
    cached = config.model_copy(update={"run": str(tmp_path / "again"), "cache": config.cache_url})
    again = planned_and_run(cached)
    assert not any(stage.missing for stage in again.work.stages.values()), "planned once more"


def test_people_are_told_whose_step_the_scores_are_about(run: Runner, lora: Trained) -> None:
    directory = run(**changes_of(lora, method="exact"))
    status = read_status(directory)
    assert status_document(status)["optimizer"].startswith("the next step of AdamW, with")
    assert lora.checkpoint in status.optimizer
    page = Path(build_report(directory)).read_text()
    assert "the next step of AdamW, with the state of" in page
    assert "AdamW after 3 steps (betas 0.8 and 0.95" in page, "the moments' coverage is not there"
    plain = run(**changes_of(lora, "sgd", method="exact"))
    assert status_document(read_status(plain))["optimizer"] is None
    assert "next step of" not in Path(build_report(plain)).read_text()


@pytest.mark.parametrize("kind", ["exact", "influence_distillation"])
def test_targets_are_exported_with_their_own_fingerprint(
    kind: str, lora: Trained, tmp_path: Path
) -> None:
    changes = changes_of(lora, method=kind)
    config = tiny_config(lora.setup, tmp_path / "run", **changes)
    run_select(config, quiet=True)
    export_vectors(config, "gradients", str(tmp_path / "out"), command="influence select")
    prints = _prints(lora, **changes)
    for folder, stage in (("candidates", "gradients"), ("targets/sums", "target_gradients")):
        files = sorted((tmp_path / "out" / folder).glob("*.parquet"))
        assert files, f"{folder}: nothing was exported"
        for file in files:
            said = b"".join(pq.read_schema(file).metadata.values())
            assert prints[stage].hex.encode() in said, f"{folder}: said to be of another stage"
