"""docs/methods.md: its two methods as they stand there, and its table of those that are built."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_plan_runs import planned_and_run
from tiny_run import Setup, manifest_of, score_column, scores_of, tiny_config
from transformers import AutoModelForCausalLM

from influence import methods
from influence.candidates import read_examples, scan_files
from influence.config_loading import BUILT
from influence.one_process import run_select
from influence.replica import load_tokenizer
from influence.tokenization import make_encoder

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's files beside the built-in methods, and their names in the registry."""
    blocks = re.findall(
        r"```python\n# influence/methods/(\w+)\.py\n(.*?)```", PAGE.read_text(), re.S
    )
    names = [name for name, _text in blocks]
    assert names == ["short", "entropy"], "the page's examples are gone, or renamed"
    for name, text in blocks:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(methods, "NAMES", (*methods.NAMES, *names))
    monkeypatch.setitem(BUILT, "method", methods.NAMES)  # which is made of them on import
    yield
    for name in names:
        sys.modules.pop(f"influence.methods.{name}", None)


@pytest.mark.usefixtures("example")
def test_the_method_of_a_few_lines_runs_as_it_stands(setup: Setup, tmp_path: Path) -> None:
    config = tiny_config(setup, tmp_path / "run", method="short")
    planned_and_run(config)
    rows = [row for row in scores_of(config.run).to_pylist() if row["reason"] is None]
    longest = max(row["n_response_tokens"] for row in rows if row["weight"] > 0)
    assert longest <= min(row["n_response_tokens"] for row in rows if row["weight"] == 0)
    assert "Short responses" in Path(config.run, "report.html").read_text()


@pytest.mark.usefixtures("example")
def test_the_method_with_a_stage_runs_and_is_found_in_the_cache(
    setup: Setup, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"method": "entropy", "cache": str(tmp_path / "cache")}
    config = tiny_config(setup, tmp_path / "run", **changes)
    plan = planned_and_run(config)
    assert plan.work.stages["entropies"].least.shards > 0
    again = tiny_config(setup, tmp_path / "again", selection__budget=5, **changes)
    run_select(again, quiet=True)
    record = manifest_of(again.run).stages["entropies"]
    assert (record.computed, record.reused) == (0, record.shards), "its shards were made anew"
    model = AutoModelForCausalLM.from_pretrained(setup.model).double().eval()
    encode = make_encoder(load_tokenizer(config.model), 128)
    found, place = score_column(config.run, "score.sums"), 0
    for file in scan_files(setup.candidates):
        for row in encode(read_examples(file, 0, file.rows - 1)):
            if np.isfinite(found[place]):
                with torch.no_grad():
                    ids = torch.as_tensor(row.input_ids, dtype=torch.int64)
                    shares = model(ids[None]).logits[0].softmax(dim=1)
                each = [
                    -float((shares[t - 1] * shares[t - 1].log()).sum())
                    for t in range(1, len(ids))
                    if row.response_mask[t]
                ]
                assert found[place] == pytest.approx(np.mean(each), rel=1e-5), f"row {place}"
            place += 1
    assert np.isfinite(found).sum() == plan.counts["scored"]


def test_the_table_has_every_method_once() -> None:
    named = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(methods.NAMES), "the page and the registry name other methods"
