"""The gradient benchmark: same inputs for all rows, fair rounds, its baselines, and its workers."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import Setup

from influence.batching import make_batches
from influence.config import ModelConfig
from influence.errors import InputError
from influence.gradients import attributed_layers, make_engine
from influence.tokenization import Encoded

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gradients
import gradients_accuracy
import gradients_inputs
import gradients_memory
import gradients_methods
import gradients_protocol
import gradients_report
import gradients_rounds
from gradients_rounds import Command, Worker, WorkerError


class HereWorker:
    """A worker in this process: what the real one does behind its pipe."""

    alive = True

    def __init__(self, name: str, _command: Command, job: Path, _threads: int):
        make = gradients_methods.METHODS[name]
        self.ready, self._ask = gradients_protocol.opened(make, gradients_protocol.read_job(job))

    def run(self, rows: list[int] | None, budget: int) -> dict[str, Any]:
        return self._ask(rows, budget)

    def close(self) -> None:
        pass


def tiny_job(folder: Path, **changes: Any) -> gradients_protocol.Job:
    """The benchmark's own synthetic rows and tiny model, by default in float64."""
    options = {"dtype": "float64", "dim": 512, "side": 8, **changes}
    vocabulary = gradients_inputs.save_shape("tiny", folder / "model")
    rows = gradients_inputs.synthetic_rows(7, 48, vocabulary, seed=0)
    gradients_protocol.write_rows(folder / "rows.npz", rows)
    return gradients_protocol.Job(
        str(folder / "model"), str(folder / "rows.npz"), random_seed=3, **options
    )


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """Every timed run collects garbage, which in a test session's process takes 0.4 s a time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
def test_every_row_counts_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients_rounds, "Worker", HereWorker)
    threads, out = torch.get_num_threads(), tmp_path / "out.json"
    options = ["--rows", "6", "--max-length", "40", "--rounds", "3", "--sweep-rows", "3"]
    options += ["--budgets", "64", "--dim", "64", "--threads", str(threads), "--device", "cpu"]
    assert gradients.main(["--tiny", "--json", str(out), *options]) == 0
    document = json.loads(out.read_text())
    assert set(document["rows"]) == set(gradients.OWN), document["failed"]
    assert set(gradients.OWN) == set(gradients_methods.METHODS)
    assert set(document["left_out"]) == set(gradients.PEERS)
    assert document["tokens"] == sum(document["lengths"])
    assert len(document["lengths"]) == 6
    for order in document["orders"]:
        assert sorted(order) == sorted(gradients.OWN)
    for name, row in document["rows"].items():
        assert row["tokens"] == document["tokens"], f"{name} was fed other tokens, or padding"
        assert len(row["tokens_per_s"]) == 3, name
        speeds = np.array(row["tokens"]) / np.array(row["seconds"])
        np.testing.assert_allclose(row["tokens_per_s"], speeds, rtol=1e-9)
        assert row["peak_mb"] > 0, name
        assert str(row["token_budget"]) in row["sweep_tokens_per_s"], name
    assert document["rows"]["batch_of_one"]["batches"] == 6
    for name in ("batch_of_one", "vmap"):
        row = document["rows"][name]
        with_projection = np.array(row["seconds"]) + np.array(row["projection_seconds"])
        expected = row["tokens"] / with_projection
        np.testing.assert_allclose(row["tokens_per_s_projected"], expected, rtol=1e-9)


def test_ours_batch_of_one_and_vmap_agree_on_the_benchmarks_inputs(tmp_path: Path):
    job = tiny_job(tmp_path)
    model, rows = gradients_protocol.load_model(job), gradients_protocol.read_rows(job.rows)
    layers = attributed_layers(model, "linear")
    weights = [layer.parameter for layer in layers]
    flat = []
    for row in rows:
        (one,) = gradients_protocol.padded([row], 1, "cpu")
        flat.append(gradients_methods.row_gradient(model, weights, one)[0])
    expected = torch.stack(flat)

    few = gradients_protocol.Job(**{**vars(job), "gradient_bytes": 4.0 * 3 * expected.shape[1]})
    products, norms = gradients_accuracy.exact_products(model, layers, rows, few)
    np.testing.assert_allclose(norms, expected.norm(dim=1), rtol=1e-6)
    gram = expected @ expected.T
    np.testing.assert_allclose(
        products, gram, rtol=1e-5, atol=1e-6, err_msg="chunks of rows in the wrong places?"
    )
    engine = make_engine(model, layers, reduction="mean", full=True)
    by_vmap = gradients_methods.vmap_gradients(model, layers)
    for batch in gradients_protocol.padded(rows, 100, "cpu"):
        truth = expected[batch.positions]
        vectors = engine(batch).vectors
        torch.testing.assert_close(vectors, truth, rtol=1e-9, atol=1e-9)
        found = by_vmap(batch)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_full_and_response_logits_have_the_same_losses(tmp_path: Path):
    job = tiny_job(tmp_path)
    model, rows = gradients_protocol.load_model(job), gradients_protocol.read_rows(job.rows)
    for row in rows:
        (one,) = gradients_protocol.padded([row], 1, "cpu")
        full = gradients_methods.full_logits_loss(model, one)
        mean = gradients_methods.response_logits_loss(model, one)
        assert float(full.detach()) / row.response.sum() == pytest.approx(
            float(mean.detach()), rel=1e-6
        )


def test_accuracy_is_perfect_where_nothing_is_lost():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(9, 30))
    norms = np.linalg.norm(vectors, axis=1)
    found = gradients_accuracy.correlations(vectors, norms, vectors @ vectors.T)
    for way in ("exact", "own"):
        assert found[f"pearson_{way}_norms"] == pytest.approx(1)
        assert found[f"rms_error_{way}_norms"] == pytest.approx(0, abs=1e-12)
    # Vectors of the wrong length harm the cosines with exact norms only.
    scale = generator.uniform(0.2, 5, size=(9, 1))
    found = gradients_accuracy.correlations(vectors * scale, norms, vectors @ vectors.T)
    assert found["pearson_own_norms"] == pytest.approx(1)
    assert found["pearson_exact_norms"] < 0.99, "exact norms are not the gradients'?"


def test_accuracy_covers_all_projections_at_equal_bytes(tmp_path: Path):
    threads = torch.get_num_threads()
    found = gradients_accuracy.accuracy(tiny_job(tmp_path, dim=4096, threads=threads))
    assert {row["bytes_per_row"] for row in found.values()} == {4 * 4096}
    sides = {f"kronecker_{side}" for side in gradients_accuracy.SIDES}
    assert set(found) == sides | {"srht", "countsketch", "rademacher"}
    for name, row in found.items():
        assert row["pearson_exact_norms"] > 0.7, f"{name}: rows in another order than the truth?"


def test_every_round_runs_every_row_once_in_an_order_of_its_own():
    names = [str(i) for i in range(8)]
    orders = gradients_rounds.round_orders(names, 5, seed=1)
    seen: list[str] = []

    def call(name: str) -> dict[str, Any]:
        seen.append(name)
        if name == "3" and seen.count("3") == 2:
            raise WorkerError("it broke")
        return {"count": len(seen)}

    found, failed = gradients_rounds.run_rounds(orders, call)
    assert failed == {"3": "it broke"}
    assert "3" not in found, "half of the rounds is no median of all"
    assert seen[:16] == orders[0] + orders[1], "a round began before the last one's end"
    assert all(sorted(order) == names for order in orders)
    assert len({tuple(order) for order in orders}) > 1, "one order favours those behind the same"
    assert all(len(found[name]) == 5 for name in names if name != "3")


def test_the_sweep_takes_the_fastest_and_survives_what_does_not_fit():
    lengths = [10, 20, 30, 40, 50]
    # A row a batch costs 1 s each; a batch of the whole costs 2 s; more does not fit.
    calls = []

    class Fake:
        def run(self, rows: list[int], budget: int) -> dict[str, Any]:
            calls.append(budget)
            own = [lengths[i] for i in rows]
            groups = gradients_rounds.grouped(own, budget)
            if budget == 150:
                return {"out_of_memory": "no"}
            if budget > 150:
                raise WorkerError("killed")
            return {"tokens": sum(own), "seconds": float(len(groups))}

    worker: Any = Fake()
    speeds = gradients_rounds.sweep(worker, [0, 1, 2, 3], lengths, [1, 20, 100, 150, 160])
    assert calls == [1, 1, 100, 150, 160], "20 gives the batches of 1; the first one warms up"
    assert speeds == {1: 25.0, 100: 50.0}
    assert gradients_rounds.best_budget(speeds) == 100
    with pytest.raises(WorkerError, match="killed"):
        gradients_rounds.sweep(worker, [0, 1], lengths, [160])


def test_batches_are_those_of_the_product(tmp_path: Path):
    job = tiny_job(tmp_path)
    rows = gradients_protocol.read_rows(job.rows)
    encoded = [
        Encoded(
            i, None, None, None, b"", r.input_ids.astype(np.int32), r.response,
            len(r.input_ids), int(r.response.sum()), False, None,
        )
        for i, r in enumerate(rows)
    ]  # fmt: skip
    for budget in (1, 40, 90, 1000):
        found = gradients_protocol.padded(rows, budget, "cpu")
        wanted = make_batches(encoded, budget)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.positions == other.positions
            for key in ("input_ids", "labels", "lengths"):
                assert torch.equal(getattr(one, key), getattr(other, key)), key
            parts = gradients_protocol.split_batch(one, 2)
            assert [i for part in parts for i in part.positions] == one.positions
            assert all(part.input_ids.shape[1] == part.lengths.max() for part in parts)


def test_rows_lie_at_even_length_quantiles():
    generator = np.random.default_rng(0)
    lengths = generator.permutation(np.repeat(np.arange(1, 101), 3))
    rows = [gradients_protocol.TokenRow(np.zeros(n), np.ones(n, bool)) for n in lengths]
    for wanted in (1, 7, 20, 300):
        chosen = [len(row.input_ids) for row in gradients_inputs.at_length_quantiles(rows, wanted)]
        levels = (np.arange(wanted) + 0.5) / wanted
        expected = np.quantile(lengths, levels, method="inverted_cdf")
        assert np.abs(np.array(chosen) - expected).max() <= 1, "a part of the lengths is missing"
    with pytest.raises(InputError, match="--rows 301: expected 1 to 300"):
        gradients_inputs.at_length_quantiles(rows, 301)


def test_rows_of_a_file_have_a_response(setup: Setup):
    model = ModelConfig.model_validate({"name": str(setup.model)})
    rows = gradients_inputs.file_rows(str(setup.candidates[0]), model, 5, 200, 100)
    assert len(rows) == 5
    lengths = [len(row.input_ids) for row in rows]
    assert lengths == sorted(lengths)
    assert all(row.response.any() for row in rows)
    assert not any(row.response[0] for row in rows), "nothing predicts the first token"


FAKE_PEER = """
import json, os, sys
print("noise of an import")
answers = os.fdopen(int(sys.argv[3]), "w")
def say(**document): print(json.dumps(document), file=answers, flush=True)
job = json.load(open(sys.argv[2]))
say(ready=True, model_mb=1.0, versions={}, name=sys.argv[1], dim=job["dim"])
for line in sys.stdin:
    command = json.loads(line)
    if command["budget"] == 99:
        sys.exit("no such batch")
    say(tokens=command["budget"], seconds=2.0, rows=command["rows"])
"""


def test_a_peer_answers_over_its_own_pipe_and_its_last_words_are_kept(tmp_path: Path):
    script, job = tmp_path / "peer.py", tmp_path / "job.json"
    script.write_text(FAKE_PEER)
    gradients_protocol.write_job(job, gradients_protocol.Job("model", "rows", dim=77))
    worker = Worker("somebody", Command(sys.executable, str(script)), job, 1)
    assert worker.ready["name"] == "somebody"
    assert worker.ready["dim"] == 77, "the peer read another job"
    assert worker.run([1, 2], 5) == {"tokens": 5, "seconds": 2.0, "rows": [1, 2]}
    assert worker.run(None, 6)["rows"] is None
    with pytest.raises(WorkerError, match=r"(?s)somebody.*exit code 1.*no such batch"):
        worker.run(None, 99)
    assert not worker.alive
    worker.close()
    script.write_text("raise SystemExit('not installed')")
    with pytest.raises(WorkerError, match="not installed"):
        Worker("somebody", Command(sys.executable, str(script)), job, 1)


def test_kept_workers_stay_and_fresh_ones_are_warmed_up(tmp_path: Path):
    script, job = tmp_path / "peer.py", tmp_path / "job.json"
    script.write_text(FAKE_PEER.replace("seconds=2.0", "seconds=2.0, pid=os.getpid()"))
    gradients_protocol.write_job(job, gradients_protocol.Job("model", "rows"))
    commands = {"peer": Command(sys.executable, str(script))}
    for keep, processes in ((True, 1), (False, 2)):
        session = gradients_rounds.Session(commands, job, 1, keep=keep)
        speeds, _ = session.choose("peer", [0], [4, 9], [1, 8])
        assert speeds == {1: 0.5}, "budgets that give the same batches are run once"
        found = [session.timed("peer", 8, [0]) for _ in range(2)]
        assert len({answer["pid"] for answer in found}) == processes
        assert all(answer["rows"] is None for answer in found), "the warm-up was timed"
        session.close()


def test_a_real_worker_gives_what_it_gives_here(tmp_path: Path):
    job, path = tiny_job(tmp_path, threads=1), tmp_path / "job.json"
    gradients_protocol.write_job(path, job)
    worker = Worker("ours_kronecker", Command(sys.executable, "gradients_worker.py"), path, 1)
    answer = worker.run([0, 2, 5], 60)
    worker.close()
    lengths = [len(row.input_ids) for row in gradients_protocol.read_rows(job.rows)]
    assert answer["tokens"] == lengths[0] + lengths[2] + lengths[5]
    assert answer["values_per_row"] == job.dim
    assert answer["peak_mb"] >= answer["model_mb"]


def test_the_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = gradients_memory.Clock(lambda: None)
    clock.start()
    now[0] += 3
    with clock.paused():
        now[0] += 10
    now[0] += 4
    assert clock.seconds() == 7
    clock.start()
    now[0] += 1
    assert clock.seconds() == 1, "pauses of the last run are still subtracted"


def test_a_peak_is_that_of_its_own_run():
    memory = gradients_memory.Memory("cpu")
    memory.reset_peak()
    before = memory.peak_mb()
    large = np.ones(25_000_000)
    assert memory.peak_mb() - before > 150
    del large
    memory.reset_peak()
    assert memory.peak_mb() - before < 100, "the peak of an earlier run stays"


def test_summary_takes_the_highest_peak_and_keeps_every_round():
    answers = [
        {"tokens": 10, "seconds": s, "peak_mb": p, "model_mb": 5.0, "peak_over_model_mb": p - 5.0}
        for s, p in ((2.0, 7.0), (1.0, 9.0), (4.0, 8.0))
    ]
    row = gradients_report.summary(answers)
    assert row["tokens_per_s"] == [5.0, 10.0, 2.5]
    assert (row["peak_mb"], row["peak_over_model_mb"]) == (9.0, 4.0)
    assert gradients_report.spread(row["tokens_per_s"]) == "5 (2-10)"
