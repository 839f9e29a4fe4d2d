"""Which rows a step takes, who takes them, and at what rate."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from influence.finetune_steps import SCHEDULES, Steps, mean_one, rate_factor, share_of


@pytest.mark.parametrize(("rows", "batch", "epochs"), [(10, 3, 2.0), (7, 7, 3.0), (5, 8, 1.0)])
def test_every_epoch_takes_every_row_once_in_an_order_of_its_own(rows, batch, epochs) -> None:
    steps = Steps(rows, batch, epochs, seed=3)
    assert steps.total == epochs * steps.per_epoch
    taken = [steps.rows_of(step).tolist() for step in range(steps.total)]
    orders = [
        list(chain(*taken[first : first + steps.per_epoch]))
        for first in range(0, steps.total, steps.per_epoch)
    ]
    assert all(sorted(order) == list(range(rows)) for order in orders), "a row twice, or never"
    assert all(one != other for one, other in pairwise(orders)), "the epochs share an order"
    assert {len(each) for each in taken[:-1]} <= {batch, rows % batch or batch}


def test_a_step_depends_on_the_seed_and_its_number_alone() -> None:
    steps = Steps(30, 4, 5, seed=1)
    backwards = {step: steps.rows_of(step).tolist() for step in reversed(range(steps.total))}
    assert all(steps.rows_of(s).tolist() == rows for s, rows in backwards.items())
    assert Steps(30, 4, 5, seed=2).rows_of(0).tolist() != backwards[0], "the seed has no effect"


@pytest.mark.parametrize(("epochs", "total"), [(0.5, 5), (0.3, 3), (1.05, 11), (1e-9, 1)])
def test_a_broken_number_of_epochs_ends_within_one(epochs: float, total: int) -> None:
    assert Steps(20, 2, epochs, seed=0).total == total


def test_what_is_due_every_epoch_or_every_few_steps_is_due_at_the_end_too() -> None:
    steps = Steps(10, 4, 2.5, seed=0)  # 3 steps an epoch, 8 in all
    assert [s for s in range(1, 9) if steps.due(s, None)] == [3, 6, 8]
    assert [s for s in range(1, 9) if steps.due(s, 5)] == [5, 8]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 26])
def test_rates_rise_to_the_peak_and_fall_as_the_schedule_says(schedule: str, steps: int) -> None:
    rates = [rate_factor(step, steps, 0.1, schedule) for step in range(steps)]
    rising = -(-steps // 10)
    falling = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "constant": lambda x: 1.0,
    }[schedule]
    expected = [(s + 1) / rising for s in range(rising)]
    expected += [falling((s + 1) / (steps - rising + 1)) for s in range(steps - rising)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-15)
    assert min(rates) > 0, "a step at rate 0 is wasted"


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_rows_are_dealt_out_once_and_evenly_by_length(workers: int) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(5, 1, 24).astype(int).tolist()
    shares = [share_of(lengths, worker, workers) for worker in range(workers)]
    assert Counter(chain(*shares)) == Counter(range(24)), "a row is lost or counts twice"
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths), "one worker waits for another's long rows"


def test_weights_are_scaled_to_a_mean_of_one() -> None:
    assert (mean_one(np.full(7, 0.3)) == 1.0).all(), "equal weights must change no bit"
    weights = np.array([0.1, 0.2, 0.7])
    scaled = mean_one(weights)
    assert scaled.mean() == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(scaled / scaled[0], weights / weights[0], rtol=1e-12)
