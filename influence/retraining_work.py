"""What a replica does for a retraining: read rows, train, take losses, commit; the model is then
as it was."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from influence.array_files import read_arrays
from influence.cache import Cache
from influence.candidates import SourceFile, read_examples, read_rows
from influence.config import Config
from influence.errors import TrainingError, UnitError
from influence.exact_match import same_answer
from influence.finetune import adapted, finetune
from influence.finetune_job import adapter_to_start, identity_of, settings_of, start_of
from influence.finetune_settings import FinetuneSettings
from influence.generation import Question, generate_answers, make_questions
from influence.held_out import row_losses
from influence.replica import Replica, load_replica, load_tokenizer
from influence.retraining_rows import ReadTraining, places, read_training
from influence.schemas import retraining_schema
from influence.score_shards import scoring_url
from influence.tokenization import Encoded, Encoder, make_encoder
from influence.training_data import TrainingRows, encoded_chunks
from influence.training_progress import TrainingProgress
from influence.units import Unit

_CHUNK = 512
_NEVER = 10**9


@dataclass(frozen=True)
class HeldOutRows:
    """A test as tokens; with the questions of its rows, where answers are generated, too."""

    encoded: list[Encoded]
    questions: list[Question | None] | None = None
    max_new_tokens: int = 0


@dataclass(frozen=True)
class Measured:
    """What a model makes of a test, by row.

    Attributes:
        losses: mean response losses in nats per token; NaN without a response.
        correct: 1 where the generated answer is the row's, else 0, NaN where there is none to
            generate; None where none was asked for.
    """

    losses: list[float]
    correct: list[float] | None = None


@dataclass(frozen=True)
class Retrained:
    """What a retraining gives, and what it took.

    Attributes:
        tests: by name.
        tokens: that were trained on, all epochs together.
        steps: of the optimiser.
        seconds: of the steps alone.
    """

    tests: dict[str, Measured]
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


def retrain(
    model: Any,
    rows: TrainingRows | None,
    measure: Callable[[], dict[str, Measured]],
    settings: FinetuneSettings,
    adapter: str | None = None,
) -> Retrained:
    """Train LoRA factors on the rows (None: none), then measure; the model stays as it was.

    Args:
        model: a causal LM on its device, without an adapter.
        measure: is called with the factors in the model, which is in evaluation mode.
        adapter: folder of an adapter to go on from, instead of fresh factors.

    Raises:
        TrainingError: not one row can be trained on, or a loss that is not finite.
    """

    def tested(folder: str | None) -> dict[str, Measured]:
        if folder is None:
            return measure()
        with adapted(model, settings, folder):
            model.eval()
            return measure()

    if rows is None:
        return Retrained(tested(adapter))
    with tempfile.TemporaryDirectory(prefix="retraining-") as folder:
        own = replace(settings, save_every=_NEVER, keep_checkpoints=0)
        watcher = TrainingProgress(quiet=True)
        record = finetune(model, rows, {}, own, folder, adapter=adapter, watcher=watcher)
        return Retrained(tested(folder), record.tokens, record.total_steps, record.seconds)


def measured(model: Any, test: HeldOutRows, tokenizer: Any, token_budget: int) -> Measured:
    """Losses of a test's rows and, where it has questions, whether the answers are right."""
    losses = row_losses(model, test.encoded, token_budget)
    if test.questions is None:
        return Measured(losses)
    asked = [(i, question) for i, question in enumerate(test.questions) if question is not None]
    answers = generate_answers(
        model,
        tokenizer,
        [question for _, question in asked],
        max_new_tokens=test.max_new_tokens,
        token_budget=token_budget,
    )
    correct = [math.nan] * len(losses)
    for (place, question), answer in zip(asked, answers, strict=True):
        correct[place] = float(same_answer(answer, question.reference))
    return Measured(losses, correct)


@dataclass(frozen=True)
class CommittedRetraining:
    """What became of a unit; see `influence.worker.UnitResult`."""

    outcome: str
    rows: int
    tokens: int
    set_up_seconds: float
    model_seconds: float
    device: str
    notes: tuple[str, ...]


class RetrainingUnits:
    """Computes such units on one replica; tokens of the last tests, and the model, are kept.

    Args:
        shared: the replica that other stages use, which serves here, too, if it is of the same
            model without an adapter and of the same dtype.
        device: the replica's device, as a function: asking for it also sets its threads.
    """

    def __init__(
        self, config: Config, shared: Callable[[], Replica], device: Callable[[], str]
    ) -> None:
        self._config, self._shared, self._device = config, shared, device
        self._cache, self._url = Cache(config.cache_url), scoring_url(config.run)
        self._held: tuple[str, dict[str, HeldOutRows]] | None = None
        self._own: Replica | None = None
        self._tokenizer: Any = None
        self._ready: tuple[Encoder, dict[str, Any], str | None] | None = None

    def run(self, unit: Unit) -> CommittedRetraining:
        """Compute and commit one unit.

        Raises:
            UnitError: its training comes to nothing (a loss that is no number).
        """
        start = time.monotonic()
        tests_key, rows_key = unit.needs
        encode, identity, adapter = self._prepared()
        replica = self._replica(identity["dtype"])
        training = read_training(self._url, rows_key)
        tests = self._tests(tests_key, encode, identity["max_length"])
        rows = None
        if len(training.positions):
            rows = TrainingRows.of(encoded_rows(training, encode), training.weights)
        settings = replace(settings_of(self._config), seed=training.seed)
        set_up = time.monotonic() - start

        def measure() -> dict[str, Measured]:
            budget = settings.token_budget
            return {
                n: measured(replica.model, t, self._tokenizer, budget) for n, t in tests.items()
            }

        try:
            found = retrain(replica.model, rows, measure, settings, adapter)
        except TrainingError as error:
            raise UnitError(str(error)) from error  # of this training alone: the others go on
        seconds = time.monotonic() - start - set_up
        facts = {
            "rows": len(rows.encoded) if rows else 0,
            "left_out": rows.left_out if rows else {},
            "tokens": found.tokens,
            "steps": found.steps,
            "seconds": found.seconds,
            "device": replica.device_name,
        }
        meta = {
            "stage": unit.stage,
            "fingerprint": unit.fingerprint,
            "training": facts,
            "device": replica.device_name,
            "torch": torch.__version__,
        }
        table = held_out_table(tests, found.tests)
        outcome = self._cache.commit(unit, table, meta)
        notes = (*replica.notes, *_left_out(rows, tests))
        return CommittedRetraining(
            outcome, table.num_rows, found.tokens, set_up, seconds, replica.device_name, notes
        )

    def _prepared(self) -> tuple[Encoder, dict[str, Any], str | None]:
        """What makes tokens, what is trained, and the adapter that it begins with."""
        if self._ready is None:
            config = self._config
            identity = identity_of(config)
            self._tokenizer = load_tokenizer(config.model)
            length, loss_on = identity["max_length"], config.data.loss_on
            encode = make_encoder(self._tokenizer, length, loss_on)
            self._ready = encode, identity, adapter_to_start(start_of(config))
        return self._ready

    def _tests(self, key: str, encode: Encoder, max_length: int) -> dict[str, HeldOutRows]:
        if self._held is None or self._held[0] != key:
            asked, _ = read_arrays(self._url, key)
            self._held = (
                key,
                {
                    name: self._test(test, encode, max_length)
                    for name, test in asked["tests"].items()
                },
            )
        return self._held[1]

    def _test(self, test: Mapping[str, Any], encode: Encoder, max_length: int) -> HeldOutRows:
        files = [SourceFile(**each) for each in test["files"]]
        encoded = [row for rows in encoded_chunks(files, encode) for row in rows]
        if not test["exact_match"]:
            return HeldOutRows(encoded)
        examples = [row for file in files for row in read_examples(file, 0, file.rows - 1)]
        questions = make_questions(self._tokenizer, examples, max_length)
        return HeldOutRows(encoded, questions, test["max_new_tokens"])

    def _replica(self, dtype: str) -> Replica:
        """The model without an adapter, in the dtype of fine-tuning."""
        config = self._config
        if config.model.adapter is None:
            shared = self._shared()
            if str(shared.dtype) == f"torch.{dtype}":
                return shared
        if self._own is None:
            plain = {"adapter": None, "adapter_revision": None}
            self._own = load_replica(config.model.model_copy(update=plain), dtype, self._device())
        return self._own


def encoded_rows(training: ReadTraining, encode: Encoder) -> list[Encoded]:
    """The training's rows as tokens, in its order; each is read once."""
    found: list[Encoded | None] = [None] * len(training.positions)
    for file, rows, where in places(training.files, training.positions):
        for first in range(0, len(rows), _CHUNK):
            part = encode(read_rows(file, rows[first : first + _CHUNK].tolist()))
            for place, row in zip(where[first : first + _CHUNK].tolist(), part, strict=True):
                found[place] = row
    return [row for row in found if row is not None]


def held_out_table(tests: Mapping[str, HeldOutRows], found: Mapping[str, Measured]) -> pa.Table:
    """The rows of a retraining's shard."""
    answers = any(test.questions is not None for test in tests.values())
    parts = []
    for name, test in tests.items():
        rows, measured = test.encoded, found[name]
        columns = {
            "test": [name] * len(rows),
            "position": np.arange(len(rows)),
            "id": [row.id for row in rows],
            "loss": _nullable(measured.losses),
            "n_response_tokens": [row.n_response_tokens for row in rows],
            "reason": [row.reason for row in rows],
        }
        if answers:
            correct = measured.correct or [math.nan] * len(rows)
            columns["correct"] = _nullable(correct).cast(pa.int8())
        parts.append(pa.table(columns, schema=retraining_schema(answers=answers)))
    return pa.concat_tables(parts)


def _nullable(values: Sequence[float]) -> pa.Array:
    numbers = np.asarray(values, dtype=np.float64)
    return pa.array(numbers, mask=np.isnan(numbers))


def _left_out(rows: TrainingRows | None, tests: Mapping[str, HeldOutRows]) -> list[str]:
    notes = [f"rows left out of a training: {reason}" for reason in (rows.left_out if rows else ())]
    for name, test in tests.items():
        total = len(test.encoded)
        if without := sum(row.reason is not None for row in test.encoded):
            notes.append(f"{name}: {without} of {total} rows have no loss and are left out")
        if without := sum(question is None for question in test.questions or ()):
            notes.append(f"{name}: {without} of {total} rows have no question to answer")
    return notes
