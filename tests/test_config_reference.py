"""docs/config.md says what the classes of the config say, and the classes do what it says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from influence.config import Config
from influence.config_loading import BUILT, put_value
from influence.config_reference import reference, rows, sections

#: What a section asks for beside any other key of it.
BESIDE = {"evaluation.downstream": {"methods": {"n": {}}, "tests": {"n": {"path": "p"}}}}
PAGE = Path(__file__).parent.parent / "docs" / "config.md"


def tables() -> dict[str, list[str]]:
    """key -> [value, default, description], as the page has them."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in lines]
    return {key.strip("`"): [cell.strip() for cell in rest] for key, *rest in cells}


def with_value(key: str, value: Any) -> Config:
    """A small config with one more value; NAME and [] become a name and an entry."""
    data: dict[str, Any] = {
        "run": "r",
        "model": {"name": "m"},
        "data": {"candidates": ["c"]},
        "targets": {"t": {"path": "p"}},
    }
    for section, required in BESIDE.items():
        if key.startswith(f"{section}."):
            put_value(data, section, copy.deepcopy(required), section)
    if key.startswith("targets.NAME."):
        key = key.replace("NAME", "t")
    if ".NAME." in key:
        section, _, inner = key.partition(".NAME.")
        entry = {"path": "p"} if section.endswith(("evaluate", "tests")) else {}
        put_value(data, section, {"n": {**entry, inner: value}}, key)
    elif "[]." in key:
        section, _, inner = key.partition("[].")
        put_value(data, section, [{inner: value}], key)
    else:
        put_value(data, key, value, key)
    return Config.model_validate(data)


def value_of(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.replace("targets.NAME", "targets.t").replace("NAME", "n").split("."):
        part, is_list = part.removesuffix("[]"), part.endswith("[]")
        node = node[part] if isinstance(node, dict) else getattr(node, part)
        node = node[0] if is_list else node
    return node


def test_the_page_is_what_the_classes_give() -> None:
    assert PAGE.read_text() == reference(), "out of date: make reference"


def test_every_key_says_what_it_is() -> None:
    listed = [row for path, section in sections() for row in rows(section, path)]
    silent = [row.key for row in listed if not row.description]
    assert not silent, f"a Field without a description, in the class of: {silent}"
    assert len(listed) > 100, "sections are missing"


def test_documented_defaults_are_accepted_and_are_the_defaults() -> None:
    checked = 0
    for key, (_, default, _) in tables().items():
        if default in ("required", "see there"):
            continue
        value = yaml.safe_load(default.strip("`").replace("\\|", "|"))
        assert value_of(with_value(key, value), key) == value, f"{key}: {default} is not it"
        checked += 1
    assert checked > 80, "the page's tables were not understood"


def test_documented_values_and_limits_are_those_that_are_checked() -> None:
    counted = {"choice": 0, "limit": 0}
    for key, (allowed, _, _) in tables().items():
        choices = re.fullmatch(r"(`[^`]+`(?:, )?)+(?: or null)?", allowed)
        if choices is not None:
            for choice in re.findall(r"`([^`]+)`", allowed):
                value = yaml.safe_load(choice)
                assert value_of(with_value(key, value), key) == value
            if key not in BUILT:
                refused(key, "no-such-value", allowed)
            counted["choice"] += 1
        for sign, limit in re.findall(r"([<>≤≥]) (2\^\d+|[\d.]+)", allowed):
            listed = allowed.startswith("list of")  # its limits are its entries'
            number = 2 ** int(limit[2:]) if "^" in limit else yaml.safe_load(limit)
            beyond = {"<": number, ">": number, "≤": number + 1, "≥": number - 1}[sign]
            refused(key, [beyond] if listed else beyond, f"{allowed}: {beyond}")
            if sign in "≤≥":
                assert with_value(key, [number] if listed else number), (
                    f"{key}: {number} is allowed by the page"
                )
            counted["limit"] += 1
    assert counted["choice"] > 10, f"the page's tables were not understood: {counted}"
    assert counted["limit"] > 40, f"the page's tables were not understood: {counted}"


def refused(key: str, value: Any, why: str) -> None:
    with pytest.raises(ValidationError):
        pytest.fail(f"{key}: accepted beyond what the page allows: {why}: {with_value(key, value)}")
