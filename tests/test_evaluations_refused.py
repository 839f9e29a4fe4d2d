"""What evaluations that train refuse before anything is selected, trained or kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_downstream import downstream_config, write_tests
from tiny_run import Setup, shards_in, tiny_config

from influence.errors import InputError
from influence.one_process import run_evaluate
from influence.plan import make_plan


@pytest.mark.parametrize(
    ("downstream", "expected"),
    [
        (
            {"methods": {"a": {"embeding": {"kind": "rds"}}}},
            "unknown key 'evaluation.downstream.methods.a.embeding'; did you mean 'embedding'",
        ),
        (
            {"methods": {"a": {"method": "rsd"}}},
            "evaluation.downstream.methods.a.method: Input should be",
        ),
        (
            {"methods": {"a": {"warmup": {}, "method": "rds"}}},
            "evaluation.downstream.methods.a.warmup: it is for method",
        ),
        ({"methods": {"a": {"method": "in2core"}}}, "methods.a.reference.adapter: method: in2core"),
        ({"methods": {"a": {"run": "x"}}}, "methods.a.run: is the same for all methods"),
        ({"methods": {"a": {"data": {"limit": 3}}}}, "methods.a.data.limit: is the same for all"),
        ({"methods": {"a": {"method": "random", "seed": 3}}}, "methods.a.seed: a random draw"),
        ({"methods": {"a-seed1": {}}}, "method name 'a-seed1'"),
        ({"methods": {"full": {}}}, "method name 'full' stands for"),
        ({"baseline": "other"}, "baseline 'other' is none of the methods: random, own, rds"),
        ({"tests": {"sums": "x.jsonl"}}, "evaluation.downstream.tests.mixed: is missing"),
        ({"tests": {"sums": "a", "mixed": "b", "c": "c"}}, "tests.c: is no target; expected one"),
        ({"tests": {"sums": "no.jsonl", "mixed": "b"}}, "evaluation.downstream.tests.sums.path: "),
    ],
)
def test_a_bad_section_is_refused_by_its_key(
    setup: Setup, tmp_path: Path, downstream: Any, expected: str
) -> None:
    def attempt() -> None:
        tests = write_tests(tmp_path)
        config = downstream_config(setup, tests, tmp_path / "run", downstream=downstream)
        run_evaluate(config, quiet=True)

    with pytest.raises(InputError) as caught:
        attempt()
    assert expected in str(caught.value)
    own = Path(tmp_path, "run", "evaluations", "downstream")
    assert not (own / "manifest.json").exists(), "a typo is held for a run"


def unusable(path: Path) -> str:
    lines = [{"question": "1 + 1", "answer": "2"}, {"messages": [{"role": "user", "content": "a"}]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", ["downstream", "lds", "leave_one_out"])
def test_a_test_without_a_usable_row_is_refused_before_anything_is_made(
    setup: Setup, tmp_path: Path, name: str
) -> None:
    """Its mean loss would be none, whatever was trained on."""
    tests = {**write_tests(tmp_path), "sums": unusable(tmp_path / "bad.jsonl")}
    methods = {"short": {"method": "length"}}
    section: dict[str, Any] = {"methods": methods, "tests": tests}
    config = tiny_config(setup, tmp_path / "run", evaluation={name: section, "seeds": 1})
    expected = (
        rf"evaluation\.{name}\.tests\.sums: none of the 2 rows of .*bad\.jsonl can be used "
        r"\(malformed: no recognised columns: 1, no assistant turn: 1\); expected rows with "
    )
    with pytest.raises(InputError, match=expected):
        run_evaluate(config, quiet=True)
    assert not shards_in(config.cache_url), "refused after something was computed"
    assert not Path(config.run, "evaluation.json").exists()
    notes = make_plan(config).notes
    assert any("bad.jsonl can be used" in note for note in notes), "the plan does not say so"


def test_subsets_of_all_rows_are_refused_before_a_method_runs(setup: Setup, tmp_path: Path) -> None:
    section = {"rows": 8, "fraction": 0.99, "methods": {"short": {"method": "length"}}}
    config = tiny_config(setup, tmp_path / "run", evaluation={"lds": section})
    with pytest.raises(
        InputError, match=r"lds\.fraction: 0\.99 of 8 rows are all of them; expected 0\.875 at most"
    ):
        run_evaluate(config, quiet=True)
    assert not Path(config.run, "evaluations/lds/short").exists()
