"""The config: what is wrong is named, what is secret is never repeated, a dump loads back."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from configs import SMALLEST, changed, refusal

from influence.config import Config
from influence.config_loading import BUILT, dump_config, load_config, parse_config
from influence.errors import InputError
from influence.reference import with_reference

FULL: dict[str, Any] = SMALLEST | {
    "cache": "s3://bucket/cache",
    "embedding": {"kind": "hidden", "blocks": 2},
    "gradients": {"side": 8, "dim": 64, "reduction": "sqrt", "normalize": False},
    "landmarks": {"damping": 1e-5},
    "selection": {"budget": "2M tokens", "per_source": {"a.b/c": {"min": 0.1, "max": 0.5}}},
    "targets": {"gsm8k": {"path": "t.jsonl", "group_by": "task"}, "bbh": {"path": "é.jsonl"}},
    "prices": {"node_hour": 2.5, "replicas_per_node": 8, "currency": "EUR"},
}


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("methd", "method"),
        ("model.nmae", "model.name"),
        ("data.max_lenght", "data.max_length"),
        ("targets.gsm8k.group_bye", "targets.gsm8k.group_by"),
        ("gradients.sides", "gradients.side"),
        ("reference.finetune.epoch", "reference.finetune.epochs"),
        ("selection.per_source.maths.mim", "selection.per_source.maths.min"),
        ("replicas.row_per_shard", "replicas.rows_per_shard"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_nearest_valid_one(typo: str, nearest: str):
    text = refusal(changed(typo, 1))
    assert f"my.yaml: unknown key {typo!r}" in text, "the typo is not named in full"
    assert f"did you mean {nearest!r}" in text, "the nearest name is missing or of another section"


def test_names_chosen_by_the_user_are_not_taken_for_keys():
    data = changed("targets", {"path": {"path": "t.jsonl", "pth": 1}})
    assert "did you mean 'targets.path.path'" in refusal(data), "a target's name was read as a key"
    assert "expected one of: kind, blocks" in refusal(changed("embedding.zzzzz", 1))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", "many", "valid integer"),
        ("seed", 1.5, "valid integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", True, "not true or false"),
        ("weights.order", True, "not true or false"),
        ("selection.budget", True, "not true or false"),
        ("data.limit", 0, "greater than 0"),
        ("gradients.side", 7, "even"),
        ("gradients.normalize", "perhaps", "boolean"),
        ("landmarks.recall", 1.5, "less than or equal to 1"),
        ("landmarks.damping", float("nan"), "finite"),
        ("landmarks.count", 3, "greater than or equal to 4"),
        ("weights.eta", float("inf"), "finite"),
        ("embedding.kind", "jpv", "did you mean 'jvp'"),
        ("method", "exakt", "did you mean 'exact'"),
        ("model", "name-only", "section of keys, for example {name"),
        ("data.candidates", [], "at least 1"),
        ("targets", {}, "at least 1"),
        ("targets", {"a/b": {"path": "x"}}, "target name 'a/b'"),
        ("targets", {"a:b": {"path": "x"}}, "target name 'a:b'"),
        ("layers", 3, "valid string"),
        ("selection.budget", [1], "valid integer"),
        ("replicas", {"min": 3, "max": 2}, "min 3 is larger than max 2"),
        ("gradients", None, "section of keys"),
    ],
)
def test_a_wrong_value_names_the_key_what_was_expected_and_what_was_found(key, value, expected):
    text = refusal(changed(key, value))
    assert expected in text
    for line in text.splitlines():
        assert line.startswith(f"my.yaml: {key}: "), "the key is not named as the user writes it"
        assert f"found {value!r}" in line, "what was found is not shown"


@pytest.mark.parametrize(
    "key", ["run", "model", "data", "targets", "model.name", "data.candidates"]
)
def test_a_missing_key_is_named(key: str):
    data = copy.deepcopy(SMALLEST)
    *sections, last = key.split(".")
    node = data
    for section in sections:
        node = node[section]
    del node[last]
    assert f"{key!r} is missing" in refusal(data)


def test_every_problem_is_listed_at_once():
    text = refusal(changed("gradients", {"sid": 4, "dim": "x"}, changed("seed", -1)))
    assert text.count("\n") == 2, "a user should not have to run once per mistake"


#: For each key with unbuilt neighbours, values that parse and that no code stands behind.
UNBUILT: dict[str, list[Any]] = {
    "landmarks.choose": ["kmeans++"],
}


def test_every_default_is_built_and_every_built_value_parses():
    config = parse_config(SMALLEST)
    for key, built in BUILT.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value in built, f"the default of {key} is refused"
        for choice in built:
            assert parse_config(changed(key, choice)), f"{key}: {choice} is listed but refused"


@pytest.mark.parametrize("key", sorted(BUILT))
def test_what_is_not_built_is_refused_by_name(key: str):
    values = [value for value in UNBUILT.get(key, []) if value not in BUILT[key]]
    assert values, f"{key}: all its values are built now; take it out of BUILT"
    for value in values:
        text = refusal(changed(key, value))
        assert text.startswith(f"my.yaml: {key}: "), text
        assert "not built yet in this version" in text, f"{key}: {value} was let through"


IN2CORE: dict[str, Any] = {**SMALLEST, "method": "in2core", "reference": {"adapter": "a"}}
OWN: dict[str, Any] = {**SMALLEST, "method": "in2core", "reference": {"finetune": {}}}
WARM: dict[str, Any] = {**SMALLEST, "warmup": {}}


@pytest.mark.parametrize(
    ("base", "key", "value", "expected"),
    [
        (SMALLEST, "layers", ["*.1.*"], "layers: .* is for method: in2core.*gradients.parameters"),
        (SMALLEST, "layers", "auto", "layers: .* is for method: in2core"),
        (SMALLEST, "selection.budget", "9% of proponents", "selection.budget: .* method: in2core"),
        (SMALLEST, "reference.adapter", "a", "reference.adapter: .* name it in model.adapter"),
        (IN2CORE, "gradients.projection", "kronecker", "gradients.projection: .*layerwise, none"),
        (SMALLEST, "gradients.reduction", "token_max", "gradients.reduction: .* method: in2core"),
        (IN2CORE, "gradients.reduction", "token_max", ".*expected gradients.projection: none"),
        (
            IN2CORE,
            "gradients",
            {"reduction": "token_max", "projection": "none", "normalize": True},
            "gradients.normalize: .* expected false",
        ),
        (IN2CORE, "layers", [], r"layers: \[\] names none"),
        (IN2CORE, "model.adapter", "b", "reference.adapter: 'a' and model.adapter: 'b'"),
        (SMALLEST, "reference.finetune", {}, "reference.finetune: .* for method: in2core"),
        (IN2CORE, "reference.finetune", {}, "reference.adapter: 'a' is there, .* one of them"),
        (OWN, "reference.finetune.data", ["x.jsonl"], "reference.finetune.data: .* `pool`"),
        (OWN, "reference.finetune.evaluate", {"a": "b"}, "reference.finetune.evaluate: .* null"),
        (OWN, "reference.finetune.output", "x", "reference.finetune.output: 'x'; expected null"),
        (WARM, "method", "rds", "warmup: .* influence_distillation and exact; with method: rds"),
        (WARM, "method", "random", "warmup: .* with method: random expected null"),
        (IN2CORE, "warmup", {}, "warmup: .* with method: in2core .* reference.finetune"),
        (WARM, "warmup.data", ["x.jsonl"], "warmup.data: .* `pool`"),
        (WARM, "warmup.evaluate", {"a": "b"}, "warmup.evaluate: .* expected null"),
        (WARM, "warmup.output", "x", "warmup.output: 'x'; expected null"),
    ],
)
def test_values_that_do_not_go_together_are_refused_by_name(
    base: dict[str, Any], key: str, value: Any, expected: str
):
    text = refusal(changed(key, value, base))
    assert re.match(f"my.yaml: {expected}", text), text


def test_in2core_has_defaults_of_its_own_and_a_dump_keeps_them():
    config = parse_config(IN2CORE)
    gradients = config.gradients
    assert (gradients.parameters, gradients.projection) == ("lora", "layerwise")
    assert not gradients.normalize, "DataInf's formula has no unit rows"
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again == config
    given = {"parameters": "linear", "normalize": True, "projection": "none"}
    assert parse_config(changed("gradients", given, IN2CORE)).gradients.normalize
    others = parse_config(SMALLEST).gradients
    assert (others.parameters, others.projection, others.normalize) == ("linear", "kronecker", True)


def test_a_warmup_is_none_or_a_fine_tuning_and_a_dump_keeps_it():
    for none in (None, {"fraction": 0}, {"fraction": 0, "epochs": 3}):
        config = parse_config(changed("warmup", none))
        assert config == parse_config(SMALLEST), f"{none}: no warm-up is not the default"
        assert parse_config(yaml.safe_load(dump_config(config))) == config
        assert config.gradients.parameters == "linear"
    given = parse_config(WARM)
    assert given.warmup is not None
    assert (given.warmup.fraction, given.warmup.epochs) == (0.05, given.finetune.epochs)
    assert given.gradients.parameters == "lora", "the optimiser has moments of nothing else"
    assert parse_config(yaml.safe_load(dump_config(given))) == given
    assert parse_config(SMALLEST, ["warmup.epochs=3"]).warmup is not None
    assert parse_config(WARM, ["warmup.fraction=0"]).warmup is None
    chosen = parse_config(changed("gradients.parameters", "linear", WARM))
    assert chosen.gradients.parameters == "linear", "a default came before what was given"


@pytest.mark.parametrize("key", ["checkpoints", "fractoin"])
def test_an_unknown_key_of_the_warmup_names_the_nearest(key: str):
    assert f"unknown key 'warmup.{key}'; did you mean" in refusal(changed(f"warmup.{key}", 1, WARM))


def test_the_reference_model_is_named_by_either_key_or_asked_for():
    for key in ("reference", "model"):
        data = changed(f"{key}.adapter", "folder", {**SMALLEST, "method": "in2core"})
        assert with_reference(parse_config(data)).model.adapter == "folder"
    without = parse_config({**SMALLEST, "method": "in2core"})
    with pytest.raises(InputError, match=r"reference\.adapter: .* LoRA") as caught:
        with_reference(without)
    assert caught.value.exit_code == 2
    own = parse_config({**SMALLEST, "method": "in2core", "gradients": {"parameters": "linear"}})
    assert with_reference(own).model.adapter is None, "the model's own weights need no adapter"
    other = parse_config(SMALLEST)
    assert with_reference(other) is other
    own = parse_config(OWN)
    assert with_reference(own) is own, "the job makes it: nothing to name"


def test_set_values_are_typed_like_yaml_and_override_the_file():
    overrides = [
        "data.limit=10",
        "data.candidates=[a.jsonl, b.jsonl]",
        "selection.budget=7%",
        "landmarks.damping=1e-6",
        "gradients.normalize=false",
        "model.adapter=null",
        "targets.new.path=n=1.jsonl",
        "embedding={kind: hidden, blocks: 3}",
        "seed=1",
        "seed=2",
    ]
    data = copy.deepcopy(FULL)
    config = parse_config(data, overrides)
    assert data == FULL, "the caller's mapping was changed"
    assert (config.data.limit, config.seed, config.landmarks.damping) == (10, 2, 1e-6)
    assert config.data.candidates == ["a.jsonl", "b.jsonl"]
    assert config.selection.budget == "7%"
    assert (config.gradients.normalize, config.model.adapter) == (False, None)
    assert config.targets["new"].path == "n=1.jsonl", "the value was cut at its second '='"
    assert set(config.targets) == {"gsm8k", "bbh", "new"}, "an override dropped its neighbours"
    assert (config.embedding.kind, config.embedding.blocks) == ("hidden", 3)


@pytest.mark.parametrize("override", ["seed", "=3", "run.deeper=1"])
def test_an_unusable_override_says_what_was_expected(override: str):
    text = refusal(SMALLEST, override)
    assert "--set" in text
    assert "KEY=VALUE" in text or "not a section" in text


@pytest.mark.parametrize("data", [SMALLEST, FULL])
def test_a_dumped_config_loads_back_equal(tmp_path, data):
    config = parse_config(data)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(path)).model_dump() == config.model_dump()
    assert set(yaml.safe_load(dump_config(config))) == set(Config.model_fields), "a key is missing"


def test_group_by_alone_asks_for_groups():
    assert parse_config(FULL).targets["gsm8k"].per == "group"
    assert parse_config(SMALLEST).targets["gsm8k"].per == "row"
    assert parse_config(changed("data.candidates", "one.jsonl")).data.candidates == ["one.jsonl"]


def test_a_value_in_place_of_a_section_is_told_what_a_section_is():
    expected = r"targets\.gsm8k: expected a section of keys, for example \{path: \.\.\.\}; found"
    with pytest.raises(InputError, match=expected):
        parse_config(changed("targets.gsm8k", "dev.jsonl"))
    with pytest.raises(InputError, match=r"selection: expected a section .*\{budget: "):
        parse_config(changed("selection", "5%"))


def test_the_cache_is_below_the_run_unless_it_is_named():
    assert parse_config(SMALLEST).cache_url == "runs/x/cache"
    assert parse_config(FULL).cache_url == "s3://bucket/cache"


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "config.yaml").write_text("run: a\n")
    with pytest.raises(InputError, match=r"confg\.yaml.*did you mean '.*/config\.yaml'"):
        load_config(str(tmp_path / "confg.yaml"))
    (tmp_path / "bad.yaml").write_text("run: a\nmodel: {name: [hunter2\n")
    with pytest.raises(InputError, match=r"bad\.yaml: not valid YAML(.|\n)*line 3") as caught:
        load_config(str(tmp_path / "bad.yaml"))
    assert "hunter2" not in str(caught.value), "a line of the file, which may hold keys, is echoed"
    (tmp_path / "twice.yaml").write_text("run: a\nselection: {budget: 1}\nselection: {}\n")
    with pytest.raises(InputError, match=r"line 2(.|\n)*'selection' is there twice(.|\n)*line 3"):
        load_config(str(tmp_path / "twice.yaml"))
    (tmp_path / "merged.yaml").write_text("a: &a {max: 1}\nreplicas: {<<: *a, <<: *a, max: 2}\n")
    with pytest.raises(InputError, match="unknown key 'a'"):  # read, and refused for that alone
        load_config(str(tmp_path / "merged.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.yaml: expected UTF-8"):
        load_config(str(tmp_path / "latin.yaml"))
    for text, found in [("", "NoneType"), ("- a\n", "list")]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=f"bad.yaml: expected a mapping.*{found}"):
            load_config(str(tmp_path / "bad.yaml"))
