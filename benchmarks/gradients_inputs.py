"""Rows and model of gradients.py: what all its workers load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from gradients_protocol import TokenRow
from safetensors.torch import save_model
from transformers import LlamaConfig

from influence.candidates import read_examples, scan_files
from influence.config import ModelConfig
from influence.errors import InputError
from influence.replica import load_replica, load_tokenizer
from influence.tokenization import make_encoder

_LLAMA3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# Llama-3.2-1B, Llama-3.1-8B (sizes from their config.json) and one for tests.
SHAPES = {
    "llama-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
SPREAD = 0.8
RESPONSE_SHARE = 0.6


def quantile_positions(count: int, wanted: int) -> list[int]:
    """`wanted` positions of a sorted list of `count`: the middles of as many equal parts.

    Raises InputError if there are too few.
    """
    if not 1 <= wanted <= count:
        raise InputError(f"--rows {wanted}: expected 1 to {count}, the rows with a response")
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def at_length_quantiles(rows: Sequence[TokenRow], wanted: int) -> list[TokenRow]:
    """Rows at even quantiles of the length, shortest first; ties keep their order."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return [ordered[i] for i in quantile_positions(len(ordered), wanted)]


def synthetic_rows(wanted: int, max_length: int, vocabulary: int, seed: int) -> list[TokenRow]:
    """Random tokens; lengths at even quantiles of a log-normal distribution, cut off at both ends.

    The median is a quarter of `max_length` and the log's standard deviation SPREAD, about what
    instruction data have; the last RESPONSE_SHARE of a row is its response.
    """
    generator = np.random.default_rng(seed)
    normal = NormalDist()
    rows = []
    for i in range(wanted):
        factor = np.exp(SPREAD * normal.inv_cdf((2 * i + 1) / (2 * wanted)))
        length = int(np.clip(round(max_length / 4 * factor), min(8, max_length), max_length))
        ids = generator.integers(3, vocabulary, length)
        rows.append(TokenRow(ids, np.arange(length) >= max(1, length * (1 - RESPONSE_SHARE))))
    return rows


def file_rows(
    path: str, model: ModelConfig, wanted: int, max_length: int, limit: int
) -> list[TokenRow]:
    """Rows of a JSONL or Parquet file's first `limit`, through the model's chat template."""
    encode = make_encoder(load_tokenizer(model), max_length)
    found = []
    for file in scan_files([path], limit):
        for row in encode(read_examples(file, 0, file.rows - 1)):
            if row.reason is None:
                found.append(TokenRow(row.input_ids, row.response_mask))
    return at_length_quantiles(found, wanted)


def save_shape(shape: str, folder: Path) -> int:
    """Only the config.json: every worker draws the weights by itself. Returns the vocabulary."""
    config = LlamaConfig(**SHAPES[shape])
    config.save_pretrained(folder)
    return config.vocab_size


def save_weights(model: ModelConfig, dtype: str, folder: Path) -> int:
    """The model in safetensors, so that all workers read the same. Returns the vocabulary."""
    loaded: Any = load_replica(model, dtype, "cpu").model
    # How a GGUF file was packed is no property of the tensors unpacked from it.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.config.save_pretrained(folder)
    save_model(loaded, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return int(loaded.config.get_text_config().vocab_size)
