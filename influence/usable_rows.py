"""Tests of which no row can be used: found before anything is computed."""

from __future__ import annotations

from collections import Counter

from influence.candidates import none_usable
from influence.config import Config
from influence.replica import load_tokenizer
from influence.retraining import Tested
from influence.tokenization import make_encoder
from influence.training_data import encoded_chunks


def check_tests(config: Config, key: str, tests: dict[str, Tested]) -> dict[str, Tested]:
    """The tests, seen to have a row with a loss each: without one, all trainings would be in vain.

    key: the config's, below which the tests are.

    Raises:
        InputError: names the test, its files, and why no row can be used.
    """
    limit = config.finetune.max_length or config.data.max_length
    encode = make_encoder(load_tokenizer(config.model), limit, config.data.loss_on)
    for name, test in tests.items():
        reasons: Counter[str] = Counter()
        for rows in encoded_chunks(test.files, encode):
            reasons.update(row.reason for row in rows if row.reason is not None)
            if any(row.reason is None for row in rows):
                break
        else:
            raise none_usable(f"{key}.{name}", test.files, reasons)
    return tests
