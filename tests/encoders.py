"""A small sentence encoder on disk, and what it makes of one text by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_run import Setup
from transformers import AutoTokenizer, BertConfig, BertModel


@pytest.fixture(scope="session")
def encoder(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT of the kind that sentence-transformers keep, with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(setup.model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return str(folder)


def alone(encoder: str, text: str) -> np.ndarray:
    """The text's embedding by itself: no padding, the mean of the last states."""
    tokens = AutoTokenizer.from_pretrained(encoder)(
        text, truncation=True, max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        states = BertModel.from_pretrained(encoder).eval()(**tokens).last_hidden_state[0]
    mean = states.mean(dim=0)
    return (mean / mean.norm()).numpy()
