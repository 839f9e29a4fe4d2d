"""Models that several threads build at once are as those that are built one after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from influence.config import ModelConfig
from influence.replica import load_replica


def test_models_loaded_at_once_keep_their_tied_weights(tmp_path: Path) -> None:
    tiny_model("gpt2", torch.float32).save_pretrained(tmp_path)
    config = ModelConfig.model_validate({"name": str(tmp_path), "device": "cpu"})
    before = PreTrainedModel.tie_weights
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            loaded = list(pool.map(lambda _: load_replica(config, "float32").model, range(8)))
        assert PreTrainedModel.tie_weights is before, "a thread put back what another had swapped"
        assert torch.get_default_dtype() == torch.float32
        for model in [*loaded, tiny_model("gpt2", torch.float32)]:
            assert model.lm_head.weight is model.transformer.wte.weight, "weights are not tied"
