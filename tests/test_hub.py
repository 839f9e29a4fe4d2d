"""Hub names: one commit for the whole job, no pickle, the GGUF file in the fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tiny_run import save_model

from influence.config import Config
from influence.config_loading import parse_config
from influence.errors import InputError, ModelLoadError
from influence.fingerprints import model_content, stage_fingerprints
from influence.hub import resolve_revision
from influence.replica import choose_device, load_replica, resolve_dtype

NAME, ADAPTER = "owner/tiny", "owner/adapter"
FIRST, SECOND = "1" * 40, "2" * 40


class Hub:
    """A local hub cache, and no network: commits as folders, `main` as a file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def commit(self, name: str, commit: str, files: Path | dict[str, bytes]) -> None:
        folder = self.root / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        if isinstance(files, Path):
            shutil.copytree(files, snapshot)
        else:
            for path, data in files.items():
                (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / path).write_bytes(data)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Hub(tmp_path / "hub")


def _config(**model: Any) -> Config:
    data = {
        "run": "runs/x",
        "model": {"name": NAME, **model},
        "data": {"candidates": ["pool.jsonl"]},
        "targets": {"t": {"path": "t.jsonl"}},
        "replicas": {"num_gpus": 0},
    }
    return parse_config(data)


def _weight(config: Config) -> torch.Tensor:
    return next(load_replica(config.model, "float32").model.parameters()).detach().clone()


def test_replicas_load_the_commit_that_the_driver_fingerprinted(hub: Hub, tmp_path: Path):
    hub.commit(NAME, FIRST, save_model(tmp_path / "a", seed=1))
    config = _config()
    pinned = resolve_revision(config)
    assert (config.model.revision, pinned.model.revision) == (None, FIRST)
    before = stage_fingerprints(config, "t")
    assert stage_fingerprints(pinned, "t") == before, "pinning a commit is no change of the numbers"
    wanted = _weight(pinned)
    hub.commit(NAME, SECOND, save_model(tmp_path / "b", seed=2))  # the branch moves
    sent = Config.model_validate(pinned.model_dump(mode="json"))  # as it travels to an actor
    assert torch.equal(_weight(sent), wanted), "a replica loaded what the branch points to now"
    assert not torch.equal(_weight(config), wanted), "the two commits hold the same weights"
    assert stage_fingerprints(sent, "t") == before
    assert resolve_revision(sent) == sent


def test_folders_are_not_pinned(tmp_path: Path):
    config = _config(name=str(tmp_path), adapter=str(tmp_path))
    assert resolve_revision(config) is config


def test_two_gguf_files_of_one_commit_are_two_models(hub: Hub):
    # No config.json: repositories of GGUF files have none.
    hub.commit(NAME, FIRST, {"q4.gguf": b"4", "deep/q8.gguf": b"8"})
    found = [model_content(_config(gguf_file=f).model) for f in ("q4.gguf", "deep/q8.gguf")]
    assert found == [f"hub:{NAME}@{FIRST}:q4.gguf", f"hub:{NAME}@{FIRST}:deep/q8.gguf"]
    assert resolve_revision(_config(gguf_file="deep/q8.gguf")).model.revision == FIRST


def test_an_adapter_on_the_hub_is_pinned_too(hub: Hub, tmp_path: Path):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
    hub.commit(ADAPTER, FIRST, files)
    config = _config(name=str(save_model(tmp_path / "m")), adapter=ADAPTER)
    pinned = resolve_revision(config)
    assert (pinned.model.revision, pinned.model.adapter_revision) == (None, FIRST)
    before = stage_fingerprints(config, "t")
    hub.commit(ADAPTER, SECOND, files)
    assert stage_fingerprints(pinned, "t") == before, "the adapter's branch moved the pinned one"
    assert stage_fingerprints(config, "t") != before


def _save_adapter(folder: Path, model: Path, *, safe: bool) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(folder))
    if not safe:
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_an_adapter_without_safetensors_is_refused_before_any_pickle(where, hub: Hub, tmp_path):
    model = save_model(tmp_path / "m")
    for safe in (True, False):
        folder = _save_adapter(tmp_path / f"{safe}", model, safe=safe)
        name = str(folder)
        if where == "hub":
            name = f"owner/{safe}"
            hub.commit(name, FIRST, folder)
        config = _config(name=str(model), adapter=name)
        if safe:
            assert "lora" in str(load_replica(config.model, "float32").model).lower()
            stage_fingerprints(config, "t")
            continue
        # Offline the hub cannot be asked, which is said; what is not done is to take the .bin.
        refusal = r"model\.adapter: .*adapter_model\.safetensors"
        with pytest.raises(InputError, match=refusal):
            load_replica(config.model, "float32")
        with pytest.raises(InputError, match=refusal):
            stage_fingerprints(config, "t")


def test_the_automatic_dtype_is_bfloat16_only_where_the_device_is_cuda(monkeypatch):
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        for device in ("auto", "cpu", "cuda"):
            for gpus in (0, 0.5, 1):
                if not cuda and (device == "cuda" or (device == "auto" and gpus)):
                    named = r"model\.device" if device == "cuda" else r"replicas\.num_gpus=0"
                    with pytest.raises(ModelLoadError, match=named):
                        choose_device(device, gpus)
                    continue
                chosen = choose_device(device, gpus)
                assert chosen == device or device == "auto"
                if resolve_dtype("auto", gpus, device) == "bfloat16":
                    assert chosen == "cuda", f"bfloat16 on a CPU, silently: {device}, {gpus} GPUs"


def test_gpus_that_are_not_there_end_a_run_in_one_process_at_once(tmp_path, monkeypatch):
    from influence.one_process import run_select

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = _config(name="no/model").model_dump(mode="json")
    config |= {"run": str(tmp_path / "run"), "replicas": {"num_gpus": 1}}
    with pytest.raises(InputError, match=r"no CUDA device; set replicas\.num_gpus=0"):
        run_select(parse_config(json.loads(json.dumps(config))))
    assert not (tmp_path / "run").exists()
