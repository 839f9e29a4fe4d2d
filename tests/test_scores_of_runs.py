"""The scores of whole runs against each row's own vectors, computed one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import Runner, Setup, messages_of, score_column, scores_of, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from influence.errors import InputError
from influence.one_process import run_select

MAX_LENGTH = 128  # as in tiny_config; row a05 is longer


def tokens_and_labels(messages: list[dict[str, str]], tokenizer: Any) -> tuple[Any, Any]:
    """Ids of a ChatML conversation, turn by turn; labels on the assistant's words and its end."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        head = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>")["input_ids"]
        tail = tokenizer("\n")["input_ids"]
        ids += head + body + tail
        own = body if message["role"] == "assistant" else [-100] * len(body)
        labels += [-100] * len(head) + own + [-100] * len(tail)
    return torch.tensor([ids[:MAX_LENGTH]]), torch.tensor([labels[:MAX_LENGTH]])


class Oracle:
    """Rows of the pool and of the targets through the model, one by one."""

    def __init__(self, setup: Setup) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(setup.model)
        self.model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float64).eval()
        # Fourteen rows of both files, rows that can be scored.
        pool = setup.folder / "pool"
        parquet = pq.read_table(pool / "a.parquet").to_pylist()
        self.rows = {f"a{i:02d}": parquet[i] for i in (0, 1, 2, 5, 16, 31, 38)}
        lines = (pool / "b.jsonl").read_text().splitlines()
        self.rows |= {f"b.jsonl:{i}": json.loads(lines[i]) for i in (0, 3, 8, 10, 15, 16, 26)}
        self.targets = {
            name: [json.loads(line) for line in Path(each["path"]).read_text().splitlines()]
            for name, each in setup.targets.items()
        }

    def unit_gradient(
        self, row: dict[str, Any], wanted: str = "_proj", every_token: bool = False
    ) -> torch.Tensor:
        ids, labels = tokens_and_labels(messages_of(row), self.tokenizer)
        labels = ids if every_token else labels
        weights = [w for n, w in self.model.named_parameters() if wanted in n]
        loss = self.model(input_ids=ids, labels=labels).loss
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        return flat / flat.norm()

    def unit_embedding(self, row: dict[str, Any]) -> torch.Tensor:
        ids, _ = tokens_and_labels(messages_of(row), self.tokenizer)
        with torch.no_grad():
            hidden = self.model.model(input_ids=ids).last_hidden_state[0]
        total = sum((t + 1) * hidden[t] for t in range(len(hidden)))
        assert isinstance(total, torch.Tensor)
        return total / total.norm()

    def scores(self, vector: Callable[[dict[str, Any]], torch.Tensor]) -> dict[str, list[float]]:
        rows = [vector(row) for row in self.rows.values()]
        groups = {
            "sums": self.targets["sums"],
            "mixed/x": [row for row in self.targets["mixed"] if row["family"] == "x"],
            "mixed/y": [row for row in self.targets["mixed"] if row["family"] == "y"],
        }
        found = {}
        for name, members in groups.items():
            mean = sum(vector(row) for row in members) / len(members)
            found[name] = [float(row @ mean) for row in rows]
        found["mixed"] = np.mean([found["mixed/x"], found["mixed/y"]], axis=0).tolist()
        return found


@pytest.fixture(scope="module")
def oracle(setup: Setup) -> Oracle:
    return Oracle(setup)


def assert_scores(directory: str, oracle: Oracle, wanted: dict[str, list[float]], **near) -> None:
    table = scores_of(directory)
    where = [table.column("id").to_pylist().index(each) for each in oracle.rows]
    for name, values in wanted.items():
        np.testing.assert_allclose(
            score_column(directory, f"score.{name}")[where],
            values,
            err_msg=f"score.{name} is not the cosine of the rows' own vectors",
            **near,
        )


def test_exact_products_are_cosines_of_autograd_gradients(run: Runner, oracle: Oracle) -> None:
    directory = run(method="exact", gradients__projection="exact")
    assert_scores(directory, oracle, oracle.scores(oracle.unit_gradient), rtol=1e-4, atol=1e-5)


def test_a_loss_on_all_tokens_is_the_models_own_with_ids_as_labels(
    run: Runner, oracle: Oracle
) -> None:
    directory = run(method="exact", gradients__projection="exact", data__loss_on="all")
    every = partial(oracle.unit_gradient, every_token=True)
    assert_scores(directory, oracle, oracle.scores(every), rtol=1e-4, atol=1e-5)
    table = scores_of(directory)
    scored = [row for row in table.to_pylist() if row["reason"] is None]
    wrong = [r["id"] for r in scored if r["n_response_tokens"] != r["n_tokens"] - 1]
    assert not wrong, f"tokens of these rows are left out, or the first one is learnt: {wrong}"


def test_whole_gradients_give_the_same_scores_without_noise(run: Runner, oracle: Oracle) -> None:
    directory = run(method="exact", gradients__projection="none")
    assert_scores(directory, oracle, oracle.scores(oracle.unit_gradient), rtol=1e-4, atol=1e-5)
    targets = json.loads(Path(directory, "fidelity.json").read_text())["targets"]
    assert all(each["sketch_sd"] == 0 for each in targets.values()), "there is no sketch"


def test_every_parameter_and_chosen_blocks(run: Runner, oracle: Oracle) -> None:
    near = {"rtol": 1e-4, "atol": 1e-5}
    every = run(method="exact", gradients__projection="exact", gradients__parameters="all")
    assert_scores(every, oracle, oracle.scores(lambda r: oracle.unit_gradient(r, "")), **near)
    last = run(
        method="exact",
        gradients__projection="exact",
        gradients__parameters=["*.q_proj.weight"],
        gradients__blocks="last 1",
    )
    name = f"layers.{oracle.model.config.num_hidden_layers - 1}.self_attn.q_proj"
    assert_scores(last, oracle, oracle.scores(lambda r: oracle.unit_gradient(r, name)), **near)


def test_projected_norms_keep_the_order_of_the_scores(run: Runner) -> None:
    """Norms of wide projections are near the exact ones, and so are the scores."""
    wide = {"method": "exact", "gradients__side": 64, "gradients__dim": 8192}
    exact, projected = (run(**wide, gradients__norms=norms) for norms in ("exact", "projected"))
    a, b = (score_column(directory, "score.sums") for directory in (exact, projected))
    np.testing.assert_allclose(a, b, atol=0.05, rtol=0, err_msg="norms of something else")
    assert not np.array_equal(a[~np.isnan(a)], b[~np.isnan(b)]), "the setting changes nothing"


def test_whole_gradients_that_do_not_fit_are_refused(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence.cost.SHARD_BYTES", 10_000)
    config = tiny_config(setup, tmp_path / "run", gradients__projection="none")
    with pytest.raises(InputError, match=r"gradients\.projection: none keeps [\d,]+ parameters"):
        run_select(config, quiet=True)


def test_rds_scores_are_cosines_of_weighted_means(run: Runner, oracle: Oracle) -> None:
    # Embeddings are kept in float16: 11 bits for each of 32 numbers.
    wanted = oracle.scores(oracle.unit_embedding)
    assert_scores(run(method="rds"), oracle, wanted, rtol=0, atol=1e-3)


# --- combinations, quotas, budgets ---
