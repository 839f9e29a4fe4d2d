"""Resuming: only what changes a result stands in the way, and it is shown before and after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from influence import storage
from influence.config import Config
from influence.config_loading import dump_config, parse_config
from influence.errors import InputError
from influence.resume import claim_run


@pytest.fixture
def data(tmp_path) -> dict[str, Any]:
    return {
        "run": str(tmp_path / "run"),
        "model": {"name": "models/m"},
        "data": {"candidates": ["pool/*.jsonl"]},
        "targets": {"gsm8k": {"path": "t.jsonl"}},
        "selection": {"per_source": {"a.b": {"max": 0.5}}},
    }


def _stored(config: Config) -> dict[str, Any]:
    return yaml.safe_load(storage.read_bytes(storage.join(config.run, "config.yaml")))


def _begin(config: Config) -> None:
    """Claim the run and leave what says that its stages began."""
    claim_run(config)
    storage.put(storage.join(config.run, "manifest.json"), b"{}")


def test_the_same_config_goes_on_and_its_file_is_complete(data):
    config = parse_config(data)
    _begin(config)
    claim_run(parse_config(copy.deepcopy(data)))
    assert _stored(config) == yaml.safe_load(dump_config(config))


@pytest.mark.parametrize(
    ("override", "key", "before", "after", "again"),
    [
        ("model.name=models/n", "model.name", "'models/m'", "'models/n'", "but the catalogue"),
        ("data.max_length=64", "data.max_length", "2048", "64", "everything"),
        ("data.limit=5", "data.limit", "None", "5", "nothing"),
        ("embedding.blocks=2", "embedding.blocks", "4", "2", "the embeddings"),
        ("gradients.side=8", "gradients.side", "64", "8", "the gradients"),
        ("gradients.normalize=false", "gradients.normalize", "True", "False", "inner products"),
        ("landmarks.count=9", "landmarks.count", "4096", "9", "gradients of new landmarks"),
        ("landmarks.damping=0.5", "landmarks.damping", "0.01", "0.5", "nothing"),
        ("selection.budget=9%", "selection.budget", "'5%'", "'9%'", "nothing"),
        ("targets.bbh.path=b.jsonl", "targets.bbh.path", "None", "'b.jsonl'", "nothing"),
        ("seed=3", "seed", "0", "3", "landmarks, embeddings and gradients"),
        ("warmup.rank=2", "warmup.rank", "None", "2", "the warm-up, and all embeddings"),
        ("method=random", "method", "'influence_distillation'", "'random'", "nothing"),
    ],
)
def test_a_changed_value_is_refused_with_both_values(data, override, key, before, after, again):
    config = parse_config(data)
    _begin(config)
    with pytest.raises(InputError) as caught:
        claim_run(parse_config(data, [override]))
    text = str(caught.value)
    assert f"{key}: was {before}, now {after}" in text
    assert again in text.split("would be computed again: ")[1], "the price of the change is wrong"
    assert "--replace" in text
    assert _stored(config) == yaml.safe_load(dump_config(config)), "a refusal changed the run"


def test_a_source_with_a_dot_in_its_name_is_compared_too(data):
    _begin(parse_config(data))
    data["selection"]["per_source"]["a.b"]["max"] = 0.75
    with pytest.raises(InputError, match=r"per_source\.a\.b\.max: was 0\.5, now 0\.75"):
        claim_run(parse_config(data))


def test_before_any_stage_began_the_config_may_be_corrected(data):
    claim_run(parse_config(data))
    corrected = parse_config(data, ["seed=3"])
    claim_run(corrected)
    assert _stored(corrected)["seed"] == 3


def test_unchanged_values_are_not_listed(data):
    _begin(parse_config(data))
    with pytest.raises(InputError) as caught:
        claim_run(parse_config(data, ["seed=3", "selection.budget=9%"]))
    assert str(caught.value).count(": was ") == 2


def test_replicas_cache_and_prices_may_change(data):
    _begin(parse_config(data))
    free = ["replicas.max=2", "replicas.rows_per_shard=9", "cache=elsewhere"]
    claim_run(parse_config(data, free))
    moved = parse_config(data, free)
    assert _stored(moved)["replicas"]["max"] == 2, "the file does not show what is running"


def test_replace_takes_the_directory(data):
    _begin(parse_config(data))
    other = parse_config(data, ["seed=3"])
    claim_run(other, replace=True)
    assert _stored(other)["seed"] == 3
    claim_run(other)


RESULTS = ["selection.jsonl", "selection/part-00000.parquet", "scores/part-00000.parquet"]
RESULTS += ["scores/part-00001.parquet", "fidelity.json", "report.html", "landmarks.parquet"]
RESULTS += ["samples.json", "evaluation.json"]


def _with_results(config: Config) -> list[str]:
    _begin(config)
    kept = ["cache/embedding/x/y.parquet", "notes.txt", "selection/mine.txt"]
    for name in (*RESULTS, *kept):
        storage.put(storage.join(config.run, name), b"old")
    return kept


def _names(run: str) -> set[str]:
    return {info.url[len(run) + 1 :] for info in storage.list_objects(run)}


@pytest.mark.parametrize("damaged", [False, True])
def test_replace_leaves_no_result_of_another_config(data, damaged):
    config = parse_config(data)
    kept = _with_results(config)
    if damaged:
        storage.put(storage.join(config.run, "config.yaml"), b"a: [")
    before = _names(config.run)
    other = parse_config(data, ["seed=3"])
    if not damaged:
        with pytest.raises(InputError):
            claim_run(other)
        assert _names(config.run) == before, "a refusal removed results"
    claim_run(other, replace=True)
    assert _names(config.run) == {"config.yaml", *kept}, "the old config's results stand beside it"


def test_replace_keeps_the_results_of_the_same_config(data):
    config = parse_config(data)
    _with_results(config)
    before = _names(config.run)
    claim_run(parse_config(data, ["replicas.max=2"]), replace=True)
    assert _names(config.run) == before


def test_a_config_without_its_defaults_is_the_same_run(data):
    """The user's own config may lie in the run directory, or an earlier version's."""
    config = parse_config(data)
    _begin(config)
    url = storage.join(config.run, "config.yaml")
    storage.put(url, yaml.safe_dump(data).encode())
    claim_run(config)
    assert _stored(config) == yaml.safe_load(dump_config(config))
    storage.put(url, yaml.safe_dump(data | {"seed": 4}).encode())
    with pytest.raises(InputError, match="seed: was 4, now 0") as caught:
        claim_run(config)
    assert str(caught.value).count(": was ") == 1, "defaults that were left out count as changes"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"method: no_longer_there\n", "method: was 'no_longer_there'"),
        (b"- a list\n", "another config"),
        (b"", "another config"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\xfd", "not valid YAML"),
    ],
)
def test_a_file_that_this_version_cannot_read_needs_replace(data, stored, message):
    config = parse_config(data)
    _begin(config)
    storage.put(storage.join(config.run, "config.yaml"), stored)
    with pytest.raises(InputError, match=message) as caught:
        claim_run(config)
    assert "--replace" in str(caught.value)
    claim_run(config, replace=True)
    claim_run(config)


def test_how_a_warmup_is_come_by_is_free_and_what_it_is_is_not(data):
    data["warmup"] = {"epochs": 3}
    _begin(parse_config(data))
    claim_run(parse_config(data, ["warmup.workers=2", "warmup.token_budget=99"]))
    with pytest.raises(InputError, match=r"warmup\.epochs: was 3\.0, now 4\.0"):
        claim_run(parse_config(data, ["warmup.epochs=4"]))
    with pytest.raises(InputError, match=r"warmup\.epochs: was 3\.0, now None"):
        claim_run(parse_config(data, ["warmup.fraction=0"]))
