"""Runs of many kinds that share one cache, and copies of it that a test may prune."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, manifest_of, shards_in, tiny_config

from influence.cli import main
from influence.config import Config
from influence.one_process import run_select

#: Configs that share one cache: what they have in common, and what each has alone.
KINDS: dict[str, dict[str, Any]] = {
    "landmarks": {},
    "more landmarks": {"landmarks__count": 32},
    "certified": {"landmarks__choose": "certified", "landmarks__initial": 8, "seed": 1},
    "narrow": {"gradients__side": 4, "gradients__dim": 32},
    "products": {"gradients__projection": "exact"},
    "row products": {"method": "exact", "gradients__projection": "exact", "seed": 1},
    "adamw": {"optimizer__kind": "adamw"},
    "rds": {"method": "rds"},
    "perplexity": {"method": "perplexity"},
    "semantic": {"method": "semantic"},
    "random": {"method": "random", "data__max_length": 100},
}
FOREIGN = ("notes.txt", ".probe-0", "catalogue/README", "hessians/" + "0" * 32 + "/ab-0-7.parquet")


@dataclass(frozen=True)
class Shared:
    """A cache that runs of all kinds filled, and their configs."""

    folder: Path
    configs: dict[str, Config]

    @property
    def cache(self) -> Path:
        """The cache's folder."""
        return self.folder / "cache"


@pytest.fixture(scope="session")
def shared(setup: Setup, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """One run of every kind."""
    folder = tmp_path_factory.mktemp("shared")
    configs = {}
    for kind, changes in KINDS.items():
        changes = dict(changes)
        if kind == "row products":  # one target of the two: the other one's products are not its
            changes["targets"] = {"sums": setup.targets["sums"]}
        if kind == "semantic":
            changes["semantic__encoder"] = encoder
        if kind == "adamw":
            changes["optimizer__state"] = _adam_state(setup, folder)
        run = folder / kind.replace(" ", "-")
        configs[kind] = tiny_config(setup, run, cache=str(folder / "cache"), **changes)
        run_select(configs[kind], quiet=True)
    return Shared(folder, configs)


def _adam_state(setup: Setup, folder: Path) -> str:
    from adam_states import saved_state
    from transformers import AutoModelForCausalLM

    return saved_state(AutoModelForCausalLM.from_pretrained(setup.model), folder)[0]


@pytest.fixture
def copied(shared: Shared, tmp_path: Path) -> Path:
    """A copy of the shared cache, all of it two hours old, with objects that are no shards."""
    copy = tmp_path / "cache"
    shutil.copytree(shared.cache, copy)
    for name in FOREIGN:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"left alone")
    age(copy, 2 * 3600)
    return copy


def age(cache: Path, seconds: float, pattern: str = "**/*") -> None:
    """Let the objects be as old as that."""
    then = time.time() - seconds
    for path in cache.glob(pattern):
        os.utime(path, (then, then))


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def planned(config: Config) -> set[str]:
    """Keys of all shards that a run has read."""
    return {key for record in manifest_of(config.run).stages.values() for key in record.planned}


def places(keys: set[str]) -> set[str]:
    """STAGE/FINGERPRINT of the keys."""
    return {key.rpartition("/")[0] for key in keys}


def left_in(cache: Path | str) -> set[str]:
    """Keys of the shards in a copy, without what only looks like one."""
    return shards_in(cache) - set(FOREIGN)
