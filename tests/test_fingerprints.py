"""Fingerprints: what changes a number changes the stages it must, and nothing else does."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from influence.config_loading import parse_config
from influence.errors import ModelLoadError
from influence.fingerprints import (
    embedding_values,
    fingerprint,
    folder_content,
    model_content,
    stage_fingerprints,
)

ALL = {"catalogue", "embedding", "gradients", "target_vectors"}
OF_MODEL = ALL - {"catalogue"}
EXACT = {"gradients", "target_vectors"}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """A config whose model and adapter are folders of a few bytes."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder, config in ((model, "config.json"), (adapter, "adapter_config.json")):
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(b"weights")
        (folder / config).write_text('{"model_type": "llama", "hidden_size": 32}')
    (adapter / "adapter_model.safetensors").write_bytes(b"more weights")
    return {
        "run": "runs/x",
        "model": {"name": str(model), "adapter": str(adapter)},
        "data": {"candidates": ["pool.jsonl"]},
        "targets": {"t": {"path": "t.jsonl"}},
        "replicas": {"num_gpus": 0},
    }


def _stages(data: dict[str, Any], *overrides: str, template: str = "template") -> dict[str, str]:
    found = stage_fingerprints(parse_config(data, overrides), template)
    return {stage: each.hex for stage, each in found.items()}


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.max_length=64", ALL),
        ("model.dtype=float64", OF_MODEL),
        ("model.attention=eager", OF_MODEL),
        ("model.adapter=null", OF_MODEL),
        ("gradients.reduction=sum", EXACT),
        ("gradients.parameters=lora", EXACT),
        ("gradients.blocks=last 2", EXACT),
        ("gradients.projection=srht", {"gradients"}),
        ("gradients.projection=none", {"gradients"}),
        ("gradients.side=8", {"gradients"}),
        ("gradients.dim=64", {"gradients"}),
        ("gradients.norms=exact", {"gradients"}),
        ("gradients.projection=layerwise", {"gradients"}),
        ("gradients.normalize=false", {"target_vectors"}),
        ("seed=1", {"embedding", "gradients"}),
        ("embedding.kind=hidden", {"embedding"}),
        ("embedding.kind=rds", {"embedding"}),
        ("embedding.blocks=2", {"embedding"}),
        ("embedding.tangents=3", {"embedding"}),
        ("embedding.tangent=dense", {"embedding"}),
        ("embedding.dim=64", {"embedding"}),
    ],
)
def test_a_value_changes_the_stages_it_must_and_no_other(data, override, expected):
    assert _changed(_stages(data), _stages(data, override)) == expected


def test_the_template_changes_everything(data):
    assert _changed(_stages(data), _stages(data, template="another")) == ALL


@pytest.mark.parametrize(
    "override",
    [
        "run=elsewhere",
        "cache=s3://bucket/cache",
        "data.candidates=[other.jsonl]",
        "data.limit=3",
        "targets.t.path=other.jsonl",
        "targets.t.per=group",
        "targets.u.path=u.jsonl",
        "selection.budget=50%",
        "selection.combine=mean",
        "landmarks.count=10",
        "landmarks.kernel=linear",
        "landmarks.damping=1",
        "replicas.max=2",
        "replicas.token_budget=128",
        "replicas.rows_per_shard=7",
        "replicas.gradient_rows_per_shard=7",
        "replicas.num_cpus=1",
        "method=exact",
        # What `auto` comes to on a CPU.
        "model.dtype=float32",
        "model.device=cpu",
    ],
)
def test_what_changes_no_number_changes_no_fingerprint(data, override):
    assert _changed(_stages(data), _stages(data, override)) == set()


@pytest.mark.parametrize(
    ("projection", "unused"),
    [
        ("srht", ["gradients.side=8"]),
        ("none", ["gradients.side=8", "gradients.dim=64", "gradients.norms=exact"]),
        ("none", ["gradients.layer_dim=8", "gradients.layer_sketch=countsketch"]),
        ("kronecker", ["gradients.layer_dim=8", "gradients.layer_sketch=countsketch"]),
        ("layerwise", ["gradients.side=8", "gradients.dim=64", "gradients.norms=exact"]),
    ],
)
def test_settings_that_the_projection_does_not_use_do_not_count(data, projection, unused):
    before = _stages(data, f"gradients.projection={projection}")
    for override in unused:
        assert _changed(before, _stages(data, f"gradients.projection={projection}", override)) == (
            set()
        )


def test_layers_that_are_projected_one_by_one_count_with_their_settings(data):
    data["method"] = "in2core"
    before = _stages(data)
    assert before == _stages(data, "gradients={projection: layerwise, parameters: lora}")
    for override in (
        "gradients.layer_dim=8",
        "gradients.layer_sketch=countsketch",
        "gradients.projection=none",
        "seed=1",
        "layers=['*.1.*']",
    ):
        assert "gradients" in _changed(before, _stages(data, override)), override
    some = _stages(data, "layers=['*.1.*', '*.2.*']")
    assert some == _stages(data, "layers=['*.2.*', '*.1.*']"), "the order of patterns counts"
    assert some != _stages(data, "layers=['*.1.*']")


def test_inner_products_need_the_full_gradients_of_the_targets_and_no_vectors(data):
    before, after = _stages(data), _stages(data, "gradients.projection=exact")
    assert set(before) - set(after) == {"gradients"}
    assert after["target_vectors"] == before["target_vectors"]


def test_random_blocks_are_drawn_with_the_seed(data):
    before = _stages(data, "gradients.blocks=random 2")
    assert "target_vectors" in _changed(
        before, _stages(data, "gradients.blocks=random 2", "seed=1")
    )


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        ("hidden", ["embedding.tangents=3", "embedding.tangent=dense"]),
        ("rds", ["embedding.tangents=3", "embedding.tangent=dense", "embedding.blocks=2"]),
    ],
)
def test_settings_that_the_embedding_does_not_use_do_not_count(data, kind, unused):
    before = _stages(data, f"embedding.kind={kind}")
    for override in unused:
        assert _changed(before, _stages(data, f"embedding.kind={kind}", override)) == set()


@pytest.mark.parametrize("kind", ["hidden", "rds"])
def test_size_and_seed_of_a_projection_count_only_where_one_takes_place(data, kind):
    """The hidden state has 32 features: from there on `dim` cuts nothing."""

    def stages(dim: int, seed: int) -> dict[str, str]:
        overrides = (f"embedding.kind={kind}", f"embedding.dim={dim}", f"seed={seed}")
        return _stages(data, *overrides)

    whole = stages(32, 0)["embedding"]
    assert {stages(dim, seed)["embedding"] for dim in (32, 4096) for seed in (0, 1)} == {whole}
    cut = [stages(dim, seed)["embedding"] for dim in (8, 31) for seed in (0, 1)]
    assert len({whole, *cut}) == 5, "projections of another size or seed share their shards"


def test_the_method_rds_shares_the_embeddings_of_that_kind(data):
    rds = parse_config(data, ["method=rds"])
    assert embedding_values(rds)["embedding"] == "rds"
    same = _stages(data, "embedding.kind=rds")["embedding"]
    assert _stages(data, "method=rds")["embedding"] == same


def test_an_adapter_is_no_model(data):
    data["model"] = {"name": data["model"]["adapter"]}
    with pytest.raises(ModelLoadError, match=r"model\.name: .*holds an adapter.*model\.adapter"):
        _stages(data)


def test_a_random_selection_needs_no_model(data):
    data["model"]["name"] = "not/there"
    assert set(_stages(data, "method=random")) == {"catalogue"}


def test_gpus_decide_what_the_automatic_dtype_is(data):
    before = _stages(data)
    assert _changed(before, _stages(data, "replicas.num_gpus=1")) == OF_MODEL, "bfloat16 there"
    fixed = _stages(data, "model.dtype=float32", "replicas.num_gpus=1")
    assert _changed(before, fixed) == set(), "a dtype that is named is the same on every device"


def test_moving_or_copying_the_folders_changes_nothing(data, tmp_path):
    before = _stages(data)
    moved = copy.deepcopy(data)
    for part in ("name", "adapter"):
        target = tmp_path / "copies" / part
        shutil.copytree(data["model"][part], target)
        os.utime(target / "a.safetensors", (1, 1))
        (target / "README.md").write_text("not part of the numbers")
        (target / "generation_config.json").write_text('{"temperature": 0.6}')
        (target / "training_args.bin").write_bytes(b"a pickle that is never loaded")
        moved["model"][part] = str(target)
    assert _stages(moved) == before, "a path, a time or a file that is not loaded counts"


@pytest.mark.parametrize(
    ("part", "file", "content"),
    [
        ("name", "a.safetensors", b"weighty"),
        ("name", "b.safetensors", b"weights"),
        ("name", "config.json", b'{"rope_theta": 1}'),
        ("adapter", "a.safetensors", b"weighty"),
        ("adapter", "adapter_config.json", b'{"lora_alpha": 8}'),
    ],
)
def test_bytes_of_model_and_adapter_count(data, part, file, content):
    before = _stages(data)
    path = Path(data["model"][part]) / file
    path.write_bytes(content)
    # Same size within a clock tick: the digest is kept by size and time.
    os.utime(path, ns=(1, 12345))
    assert _changed(before, _stages(data)) == OF_MODEL


def test_weights_cannot_trade_places(tmp_path):
    for folder, first, second in (("x", b"1", b"2"), ("y", b"2", b"1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.safetensors").write_bytes(first)
        (tmp_path / folder / "b.safetensors").write_bytes(second)
    assert folder_content(str(tmp_path / "x")) != folder_content(str(tmp_path / "y"))


def test_the_code_of_a_model_counts_where_it_is_run(data):
    code = Path(data["model"]["name"]) / "modeling.py"
    before, trusted = _stages(data), _stages(data, "model.trust_remote_code=true")
    code.write_text("scale = 2")
    assert _stages(data) == before, "code that is not run counts"
    after = _stages(data, "model.trust_remote_code=true")
    assert _changed(trusted, after) == OF_MODEL, "the model's own code changed unseen"


def test_of_a_gguf_model_only_that_file_counts(data):
    folder = Path(data["model"]["name"])
    (folder / "q4.gguf").write_bytes(b"four bits")
    data["model"]["gguf_file"] = "q4.gguf"
    before = model_content(parse_config(data).model)
    (folder / "a.safetensors").write_bytes(b"not loaded")
    assert model_content(parse_config(data).model) == before
    (folder / "q4.gguf").write_bytes(b"four other bits")
    assert model_content(parse_config(data).model) != before
    data["model"]["gguf_file"] = "q5.gguf"
    with pytest.raises(ModelLoadError, match=r"'q5\.gguf' is not in .* there: q4\.gguf"):
        model_content(parse_config(data).model)


def test_models_that_cannot_be_identified_are_refused_by_name(data, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    data["model"]["name"] = str(tmp_path / "empty")
    with pytest.raises(ModelLoadError, match=r"empty.* holds no weights"):
        _stages(data)
    data["model"]["name"] = "no-such-owner/no-such-model"
    with pytest.raises(ModelLoadError, match=r"model\.name: 'no-such-owner/no-such-model'"):
        _stages(data)
    data["model"]["name"] = "package:no_such_package"
    with pytest.raises(ModelLoadError, match="no_such_package"):
        _stages(data)


def test_a_fingerprint_is_of_the_values_not_of_their_order():
    values = {"b": [1, 2], "a": {"y": None, "x": 0.1}}
    same = json.loads(json.dumps({"a": {"x": 0.1, "y": None}, "b": [1, 2]}))
    assert fingerprint(values).hex == fingerprint(same).hex
    assert fingerprint(values).values == values
    assert len(fingerprint({}).hex) == 32
    others = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"a": None}, {"ab": 1}, {"a": 1, "b": 1}]
    assert len({fingerprint(other).hex for other in others}) == len(others)
