"""When a selection of `evaluation.downstream` is made again: by contents, never by paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_downstream import downstream_config, own_run, result_of
from tiny_run import Setup, manifest_of, scores_of, shards_in

from influence.config import Config
from influence.evaluations import downstream_arms
from influence.evaluations.downstream import settings
from influence.evaluations.downstream_arms import _Prints, arms_of
from influence.one_process import run_evaluate
from influence.pipeline import prepare
from influence.progress import Progress
from influence.reference import with_reference


def scale_weights(folder: str, factor: float) -> None:
    """Another content at the same path."""
    (path,) = Path(folder).glob("*.safetensors")
    weights = {name: factor * tensor for name, tensor in load_file(path).items()}
    save_file(weights, path)


def write_row(path: Path, text: str) -> str:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return str(path)


def write_bytes(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def paths(tmp_path: Path, setup: Setup, adapter: str, encoder: str) -> dict[str, str]:
    """Everything that a method's config can name, in folders of this test."""
    here = tmp_path / "named"
    return {
        "model": str(shutil.copytree(setup.model, here / "model")),
        "adapter": str(shutil.copytree(adapter, here / "adapter")),
        "reference": str(shutil.copytree(adapter, here / "reference")),
        "encoder": str(shutil.copytree(encoder, here / "encoder")),
        "guard": write_row(here / "guard.jsonl", "one"),
        "state": write_bytes(here / "optimizer.pt", b"moments"),
    }


def config_of(setup: Setup, run: Path, paths: dict[str, str], **methods: Any) -> Config:
    drop = {"action": "drop", "against": {"held": paths["guard"]}}
    named = {
        "own": {},
        "tuned": {"model": {"adapter": paths["adapter"]}},
        "reference": {"method": "in2core", "reference": {"adapter": paths["reference"]}},
        "semantic": {"method": "semantic", "semantic": {"encoder": paths["encoder"]}},
        "guarded": {"method": "rds", "contamination": drop},
        "adam": {
            "method": "exact",
            "model": {"adapter": paths["adapter"]},
            "optimizer": {"kind": "adamw", "state": paths["state"]},
        },
        "warmed": {"method": "exact", "warmup": {"rank": 2}, "optimizer": {"kind": "adamw"}},
        **methods,
    }
    target = setup.targets["sums"]
    config = downstream_config(
        setup,
        {"sums": target["path"]},
        run,
        targets={"sums": target},
        downstream={"methods": named, "full": False},
    )
    model = config.model.model_copy(update={"name": paths["model"]})
    return config.model_copy(update={"model": model})


def digests(config: Config) -> dict[str, str]:
    own = with_reference(settings(config))
    prints = _Prints(prepare(own, Progress(quiet=True)))
    return {arm.name: prints.of(arm) for arm in arms_of(own) if not arm.seed}


def test_contents_count_and_paths_do_not(
    setup: Setup, tmp_path: Path, paths: dict[str, str]
) -> None:
    before = digests(config_of(setup, tmp_path / "run", paths))
    moved = shutil.copytree(tmp_path / "named", tmp_path / "moved")
    elsewhere = {name: str(moved / Path(path).name) for name, path in paths.items()}
    again = digests(config_of(setup, tmp_path / "other", elsewhere))
    assert again == before, "a selection is made again for a path's sake"

    def changed() -> set[str]:
        now = digests(config_of(setup, tmp_path / "run", paths))
        found = {name for name in now if now[name] != before[name]}
        before.update(now)
        return found

    scale_weights(paths["adapter"], 2.0)
    assert changed() == {"tuned", "adam"}
    write_bytes(Path(paths["state"]), b"other moments")
    assert changed() == {"adam"}
    scale_weights(paths["reference"], 2.0)
    assert changed() == {"reference"}
    scale_weights(paths["encoder"], 2.0)
    assert changed() == {"semantic"}
    write_row(Path(paths["guard"]), "two")
    assert changed() == {"guarded"}
    scale_weights(paths["model"], 2.0)
    of_model = {"own", "tuned", "reference", "guarded", "adam", "warmed"}
    assert changed() == of_model, "these run the model"
    tokenizer = Path(paths["model"], "tokenizer_config.json")
    fields = json.loads(tokenizer.read_text())
    fields["eos_token"] = "<|endoftext|>"
    tokenizer.write_text(json.dumps(fields))
    assert changed() == set(before), "other tokens, other rows to select among"


def test_a_record_does_not_outlive_its_selection(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another method was selected with, and stopped before its record was there."""
    target = setup.targets["sums"]

    def evaluated(method: str) -> Config:
        section = {"methods": {"m": {"method": method}}, "full": False, "seeds": 1}
        tests, targets = {"sums": target["path"]}, {"sums": target}
        config = downstream_config(
            setup, tests, tmp_path / "run", targets=targets, downstream=section
        )
        run_evaluate(config, quiet=True, replace=True)
        return config

    def stop(record: Any) -> bytes:
        raise KeyboardInterrupt

    config = evaluated("length")
    rows = scores_of(f"{own_run(config)}/sums/m").column("weight").to_pylist()
    with monkeypatch.context() as patch:
        patch.setattr(downstream_arms, "to_json", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluated("perplexity")
    assert scores_of(f"{own_run(config)}/sums/m").column("weight").to_pylist() != rows
    evaluated("length")
    found = scores_of(f"{own_run(config)}/sums/m").column("weight").to_pylist()
    assert found == rows, "trained on the selection of another method"


def test_an_adapter_that_is_trained_anew_has_its_selection_made_anew(
    setup: Setup, tmp_path: Path, paths: dict[str, str]
) -> None:
    """As where a second round selects with what the first one trained."""
    methods = {key: {"method": "rds"} for key in ("reference", "semantic", "guarded", "adam")}
    config = config_of(setup, tmp_path / "run", paths, **methods)
    run_evaluate(config, quiet=True)
    arms = {name: f"{own_run(config)}/sums/{name}" for name in ("own", "tuned")}
    before = {name: manifest_of(arm).stages["gradients"] for name, arm in arms.items()}
    scale_weights(paths["adapter"], -3.0)
    made = shards_in(config.cache_url)
    run_evaluate(config, quiet=True)
    own, tuned = (manifest_of(arm).stages["gradients"] for arm in arms.values())
    assert own == before["own"], "a selection whose model stayed is made again"
    assert tuned.fingerprint != before["tuned"].fingerprint, "the selection is the old adapter's"
    assert shards_in(config.cache_url) > made
    assert set(result_of(config)["targets"]["sums"]["results"]) >= {"own", "tuned"}
