"""Training by hand: what a retraining's unit has to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from influence.candidates import SourceFile, read_examples
from influence.config import Config
from influence.finetune import adapted, finetune
from influence.finetune_job import settings_of
from influence.held_out import row_losses
from influence.replica import load_replica, load_tokenizer
from influence.retraining_rows import Training
from influence.tokenization import make_encoder
from influence.training_data import TrainingRows


def trained_by_hand(
    config: Config,
    files: Sequence[SourceFile],
    tests: Mapping[str, Sequence[SourceFile]],
    training: Training,
    folder: Path,
) -> dict[str, list[float]]:
    """A fresh model, `finetune` on the rows of the files, read one file at a time, `row_losses`."""
    model = load_replica(config.model, "float32", "cpu").model
    encode = make_encoder(load_tokenizer(config.model), config.data.max_length)
    pool = [row for f in files for row in encode(read_examples(f, 0, f.rows - 1))]
    asked = {
        name: [row for f in members for row in encode(read_examples(f, 0, f.rows - 1))]
        for name, members in tests.items()
    }
    settings = replace(settings_of(config), seed=training.seed)
    rows = TrainingRows.of([pool[i] for i in training.rows], training.weights)
    finetune(model, rows, {}, settings, str(folder / "adapter"))
    with adapted(model, settings, str(folder / "adapter")):
        model.eval()
        budget = settings.token_budget
        return {name: row_losses(model, each, budget) for name, each in asked.items()}
