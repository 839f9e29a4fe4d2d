"""What cannot be done is refused as soon as that is known: by the plan, before a model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Setup, shards_in, tiny_config

from influence.config import ModelConfig
from influence.errors import InputError, ModelLoadError
from influence.one_process import run_select
from influence.plan import make_plan
from influence.replica import load_tokenizer
from influence.status import read_status


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"physics": {"min": 0.8}}, r"per_source\.physics: matches no source"),
        ({"maths": {"min": 0.8}, "code": {"min": 0.8}}, r"minima of maths, code sum to 1\.6"),
        ({"maths": {"min": 1.0}}, r"per_source\.maths\.min: 1 of 60 rows are 60, but"),
    ],
)
@pytest.mark.parametrize("method", ["influence_distillation", "random"])
def test_quotas_that_the_pool_cannot_meet(
    setup: Setup, tmp_path: Path, method: str, quotas: dict[str, Any], expected: str
) -> None:
    config = tiny_config(
        setup,
        tmp_path / "run",
        method=method,
        selection={"budget": 60, "per_source": quotas},
    )
    with pytest.raises(InputError, match=expected):
        make_plan(config)
    with pytest.raises(InputError, match=expected):
        run_select(config, quiet=True)
    stages = {key.split("/")[0] for key in shards_in(config.cache_url)}
    assert stages <= {"catalogue", "contamination"}, "refused after something was computed"


def test_embeddings_of_more_blocks_than_the_model_has(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run", embedding__blocks=4)
    expected = "embedding.blocks: 4, expected 1 to 3"
    assert any(expected in note for note in make_plan(config).notes)
    with pytest.raises(InputError, match=expected):
        run_select(config, quiet=True)
    stages = {key.split("/")[0] for key in shards_in(config.cache_url)}
    assert stages <= {"catalogue", "contamination"}, "refused after something was computed"


def test_an_answer_that_is_no_row_is_said_with_its_file_and_the_forms(
    setup: Setup, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps({"question": "1 + 1", "answer": "2"}) + "\n")
    config = tiny_config(setup, tmp_path / "run", targets={"sums": {"path": str(path)}})
    expected = (
        r"targets\.sums: none of the 1 rows of .*wrong\.jsonl can be used \(malformed: no "
        r"recognised columns: 1\); expected rows with `messages`.*`completion`"
    )
    with pytest.raises(InputError, match=expected):
        run_select(config, quiet=True)


def test_a_folder_of_quantised_weights_asks_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_1.gguf").touch()
    config = ModelConfig(name=str(tmp_path))  # pyright: ignore[reportCallIssue]
    with pytest.raises(
        ModelLoadError, match=r"holds tiny\.Q4_1\.gguf: name it in model\.gguf_file"
    ):
        load_tokenizer(config)


def test_the_status_of_a_folder_with_evaluations_alone_names_them(tmp_path: Path) -> None:
    own = tmp_path / "evaluations" / "lds"
    own.mkdir(parents=True)
    (own / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=rf"or that of an evaluation: {own}$"):
        read_status(str(tmp_path))
