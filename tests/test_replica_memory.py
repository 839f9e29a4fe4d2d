"""The estimate of a replica's memory against what autograd really keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_batch

from influence.config_loading import parse_config
from influence.cost import replica_memory
from influence.gradients import attributed_layers, make_engine
from influence.gradients.backward import backpropagate
from influence.model_shape import model_shape

LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ],
    "base_model_name_or_path": "base",
}


def job(folder: Path, description: dict[str, Any], **gradients: Any) -> Any:
    """A config around a model that has a config.json and no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(description))
    return parse_config(
        {
            "run": "runs/x",
            "model": {"name": str(folder), "dtype": "bfloat16"},
            "data": {"candidates": ["pool.jsonl"]},
            "targets": {"t": {"path": "t.jsonl"}},
            "gradients": gradients,
            "replicas": {"num_gpus": 1, "token_budget": 4096},
        }
    )


def test_a_7b_model_with_lora_gradients_fits_a_gpu_of_80_gb(tmp_path: Path) -> None:
    config = job(tmp_path / "model", LLAMA_7B, parameters="lora", projection="none")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(LORA))
    model = config.model.model_copy(update={"adapter": str(adapter)})
    config = config.model_copy(update={"model": model})
    shape = model_shape(config)
    assert shape.attributed == 32 * 8 * (4 * 8192 + 3 * 15104), "LoRA factors of rank 8"
    memory = replica_memory(config, shape, "bfloat16", response_share=0.5, columns=1)
    assert memory.weights == pytest.approx(13.5e9, rel=0.02)
    assert memory.total < 80e9 * 0.8, f"{memory}: no room for fragmentation and the workspace"


@pytest.mark.parametrize(("kind", "heads"), [("llama", 2), ("qwen3", 4), ("gpt2", 4)])
def test_activations_are_what_autograd_keeps(tmp_path: Path, kind: str, heads: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"hidden_size": 256, "intermediate_size": 700, "num_key_value_heads": heads}
    if kind == "gpt2":
        common, sizes = {"vocab_size": 97}, {"n_embd": 256, "n_layer": 2, "n_head": 4}
    description = {"model_type": kind, **common, **sizes}
    config = job(tmp_path / "model", description)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description)).eval()
    layers = attributed_layers(model, "linear")
    lengths = (60, 60, 60, 60)
    batch = random_batch(lengths, seed=1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        backpropagate(
            model,
            layers,
            batch,
            reduction="mean",
            consume=lambda _layer, terms: inputs.append(terms[0].x),
        )
    for x in inputs:
        note(x)
    shape = model_shape(config)
    budget = config.replicas.model_copy(update={"token_budget": sum(lengths)})
    estimate = replica_memory(
        config.model_copy(update={"replicas": budget}), shape, "float32", 0.5, 1
    )
    ratio = estimate.activations / sum(kept.values())
    assert 0.75 < ratio < 1.6, f"{kind}: estimated {ratio:.2f} of what is kept"


def test_peak_does_not_grow_with_the_number_of_samples() -> None:
    """After every batch nothing of it is left but its results."""
    import gc

    from tiny_models import tiny_model

    model = tiny_model("llama")
    engine = make_engine(model, attributed_layers(model, "all"), reduction="mean")

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    engine(random_batch(seed=0))
    before = tensors()
    for seed in range(1, 6):
        engine(random_batch(seed=seed))
    assert tensors() <= before, "tensors of earlier batches are still held"
