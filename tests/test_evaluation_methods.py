"""Methods that evaluations compare: what of the base's config each of them has, and what not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, manifest_of, tiny_config

from influence.config import Config
from influence.embedding_kind import EmbeddingKind, distinct, variants
from influence.errors import InputError
from influence.evaluations import EVALUATIONS
from influence.evaluations.downstream_arms import arms_of
from influence.finetune_job import settings_of
from influence.finetune_settings import FinetuneSettings
from influence.one_process import run_evaluate

METHODS = {
    "exact": {"method": "exact"},
    "rds": {"method": "rds"},
    "less": {"method": "less"},
    "in2core": {"method": "in2core", "reference": {"finetune": {}}},
    "perplexity": {"method": "perplexity"},
}
#: Configs whose method has values of its own in sections that others read, or sections of its own.
BASES: dict[str, dict[str, Any]] = {
    "less": {"method": "less"},
    "adam": {"method": "exact", "warmup": {}, "optimizer": {"kind": "adamw"}},
    "second": {"method": "exact", "weights": {"order": 2}},
    "in2core": {"method": "in2core", "reference": {"finetune": {}}, "layers": ["*q_proj*"]},
}


def arms_by_name(config: Config) -> dict[str, Config]:
    own = EVALUATIONS["downstream"].settings(config)
    return {arm.name: arm.config for arm in arms_of(own)}


def methods_of_lds(config: Config) -> dict[str, Config]:
    own = EVALUATIONS["lds"].settings(config).evaluation.lds
    assert own is not None
    return {name: Config.model_validate(whole) for name, whole in own.methods.items()}


def compared(setup: Setup, run: Path, name: str, **base: Any) -> dict[str, Config]:
    """The methods' configs; `name` is the evaluation."""
    tests = {target: {"path": one["path"]} for target, one in setup.targets.items()}
    section = {"methods": METHODS, "tests": tests}
    config = tiny_config(setup, run, evaluation={name: section}, **base)
    return arms_by_name(config) if name == "downstream" else methods_of_lds(config)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("name", ["downstream", "lds"])
def test_a_method_is_the_same_whatever_the_method_beside_it(
    setup: Setup, tmp_path: Path, name: str, base: str
) -> None:
    plain = compared(setup, tmp_path, name, method="random")
    found = compared(setup, tmp_path, name, **BASES[base])
    shared = {"exact", "less"} if base == "adam" else {"exact"} if base == "second" else set()
    for method in METHODS:
        if method == base or method in shared:
            continue  # those have a use for the base's own sections
        assert found[method].model_dump() == plain[method].model_dump(), (
            f"{method} beside a base of {base} has what only the base's method is to have"
        )
    for method in shared:
        assert found[method].warmup is not None or base == "second", "the warm-up is not passed on"
    if "exact" in shared:
        own = found["exact"]
        assert (own.optimizer.kind, own.weights.order) == (
            ("adamw", 1) if base == "adam" else ("sgd", 2)
        ), "a section that the method does have a use for is lost"


def test_a_section_that_the_method_itself_names_is_judged(setup: Setup, tmp_path: Path) -> None:
    tests = {target: {"path": one["path"]} for target, one in setup.targets.items()}
    methods = {"rds": {"method": "rds", "optimizer": {"kind": "adamw"}}}
    section = {"methods": methods, "tests": tests}
    config = tiny_config(setup, tmp_path, evaluation={"downstream": section})
    with pytest.raises(InputError, match=r"methods\.rds\.optimizer"):
        EVALUATIONS["downstream"].settings(config)


@pytest.mark.parametrize("name", ["downstream", "lds", "leave_one_out"])
@pytest.mark.parametrize(
    ("key", "value"), [("data", "pool"), ("weights", False), ("workers", 2), ("evaluate", {})]
)
def test_a_recipe_names_nothing_that_the_evaluation_decides(
    setup: Setup, tmp_path: Path, name: str, key: str, value: Any
) -> None:
    tests = {target: {"path": one["path"]} for target, one in setup.targets.items()}
    section = {"methods": {"own": {}}, "tests": tests}
    config = tiny_config(setup, tmp_path, finetune={key: value}, evaluation={name: section})
    EVALUATIONS[name].settings(config)  # the section of `influence finetune` may have them
    own = {**section, "finetune": {key: value}}
    config = tiny_config(setup, tmp_path, evaluation={name: own})
    with pytest.raises(InputError, match=rf"evaluation\.{name}\.finetune\.{key}"):
        EVALUATIONS[name].settings(config)
    own = {**section, "methods": {"own": {"finetune": {"epochs": 9}}}}
    config = tiny_config(setup, tmp_path, evaluation={name: own})
    with pytest.raises(InputError, match=rf"evaluation\.{name}\.methods\.own\.finetune"):
        EVALUATIONS[name].settings(config)


@pytest.mark.parametrize("name", ["downstream", "lds", "leave_one_out"])
def test_trainings_reduce_losses_and_count_seeds_as_the_config_says(
    setup: Setup, tmp_path: Path, name: str
) -> None:
    tests = {target: {"path": one["path"]} for target, one in setup.targets.items()}
    section = {"methods": {"own": {}}, "tests": tests}
    given = {"gradients__reduction": "sum", "finetune": {"seed": 7}}
    config = tiny_config(setup, tmp_path, evaluation={name: section}, **given)
    found: FinetuneSettings = settings_of(EVALUATIONS[name].settings(config))
    assert (found.reduction, found.seed) == ("sum", 7)
    if name == "downstream":
        arms = arms_of(EVALUATIONS[name].settings(config))
        seeds = {arm.seed for arm in arms if arm.seed is not None}
        assert seeds <= {7, 8, 9}, "draws are of other seeds than the trainings on them"


@pytest.mark.parametrize("name", ["fidelity", "lds", "downstream", "leave_one_out"])
def test_a_contamination_that_drops_rows_drops_them_here_too(
    setup: Setup, tmp_path: Path, name: str
) -> None:
    tests = {target: {"path": one["path"]} for target, one in setup.targets.items()}
    section = {} if name == "fidelity" else {"methods": {"own": {}}, "tests": tests}
    for action, kept in (("drop", True), ("flag", False), ("keep", False)):
        config = tiny_config(
            setup, tmp_path, evaluation={name: section}, contamination={"action": action}
        )
        own = EVALUATIONS[name].settings(config)
        assert (own.contamination is not None) == kept, f"{action}: {own.contamination}"


def test_the_truth_is_about_the_rows_that_are_left(setup: Setup, tmp_path: Path) -> None:
    """A copy of a target row, which would rank first, is not among them."""
    path = next(iter(setup.targets.values()))["path"]
    copies = tmp_path / "copies.jsonl"
    copies.write_text(Path(path).read_text().splitlines()[0] + "\n")
    candidates = setup.candidates
    candidates = [candidates] if isinstance(candidates, str) else list(candidates)
    section = {"pilot": None, "landmarks": [8], "repeats": 1, "embeddings": [{"kind": "rds"}]}
    section |= {"kernels": [], "damping": [], "recalls": []}
    rows = {}
    for action in ("flag", "drop"):
        config = tiny_config(
            setup,
            tmp_path / action,
            cache=str(tmp_path / "cache"),
            method="exact",
            data__candidates=[*candidates, str(copies)],
            contamination={"action": action},
            evaluation={"fidelity": section},
        )
        run_evaluate(config, quiet=True)
        found = json.loads(Path(config.run, "evaluation.json").read_text())["fidelity"]
        rows[action] = found["about"]["pilot"]
        stages = manifest_of(f"{config.run}/evaluations/fidelity").stages
        assert ("contamination" in stages) == (action == "drop"), "compared, and nobody asks"
    assert rows["drop"] == rows["flag"] - 1, f"a dropped row is part of the truth: {rows}"


def test_embeddings_have_one_label_if_and_only_if_they_have_the_same_numbers() -> None:
    kinds = [
        EmbeddingKind(*each)
        for each in itertools.product(
            ("hidden", "jvp", "rds"), (1, 2), (1, 2), ("rank1", "dense"), (64, 512, 4096)
        )
    ]
    for one, other in itertools.combinations(kinds, 2):
        same = len(distinct([one, other])) == 1
        assert (one.label == other.label) == same, f"{one} and {other}: {one.label}"


@pytest.mark.parametrize(
    "own",
    [("jvp", 4, 2, "rank1", 4096), ("jvp", 2, 1, "dense", 64), ("hidden", 2, 2, "rank1", 4096)],
)
def test_variants_change_one_number_that_is_read(own: tuple[Any, ...]) -> None:
    kind = EmbeddingKind(*own)
    found = variants(kind, hidden=576)
    for each in found:
        assert sum(a != b for a, b in zip(kind, each, strict=True)) == 1
    assert len(distinct([kind, *found])) == 1 + len(found), "a variant has the same numbers"
    assert all(each.width(576) != kind.width(576) for each in found if each.dim != kind.dim)
    changed = {f for each in found for f in each._fields if getattr(each, f) != getattr(kind, f)}
    wanted = {"tangents", "tangent"} if kind.kind == "jvp" else set()
    assert changed == wanted | ({"dim"} if kind.width(576) > 256 else set())
