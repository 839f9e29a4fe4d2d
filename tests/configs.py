"""The smallest config, its changes, and what is said of one that is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from influence.config_loading import parse_config
from influence.errors import InputError

SMALLEST: dict[str, Any] = {
    "run": "runs/x",
    "model": {"name": "models/m"},
    "data": {"candidates": ["pool/*.jsonl"]},
    "targets": {"gsm8k": {"path": "t.jsonl"}},
}


def changed(key: str, value: object, base: dict[str, Any] = SMALLEST) -> dict[str, Any]:
    data = copy.deepcopy(base)
    node = data
    *sections, last = key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return data


def refusal(data: object, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(data, overrides, name="my.yaml")
    assert caught.value.exit_code == 2, "bad configs end with exit code 2"
    return str(caught.value)
