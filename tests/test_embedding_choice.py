"""`embedding.kind: auto`: the choice against loops, and against a run that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, assert_same_results, manifest_of, shards_in, tiny_config

from influence.one_process import run_select

CHOICES = [
    {"kind": "hidden", "blocks": 1},
    {"kind": "jvp", "blocks": 2},
    {"kind": "rds"},
]


def auto(**changes: Any) -> dict[str, Any]:
    return {"kind": "auto", "pilot": 16, "choices": CHOICES, **changes}


@pytest.mark.parametrize("choose", ["uniform", "certified"])
def test_the_selection_is_that_of_a_run_that_names_the_choice(
    setup: Setup, tmp_path: Path, choose: str
) -> None:
    changes = {"cache": str(tmp_path / "cache"), "landmarks__choose": choose}
    config = tiny_config(setup, tmp_path / "auto", embedding=auto(), **changes)
    run_select(config, quiet=True)
    found = manifest_of(config.run).embedding
    assert found is not None, "the choice is not in the manifest"
    names = ("kind", "blocks", "tangents", "tangent", "dim")
    settings = dict(zip(names, found.settings, strict=True))
    made = shards_in(tmp_path / "cache")
    other = tiny_config(setup, tmp_path / "named", embedding=settings, **changes)
    run_select(other, quiet=True)
    assert_same_results(config.run, other.run, "the chosen embedding is not the one that is named")
    assert shards_in(tmp_path / "cache") == made, "shards are not shared with a run that names it"
