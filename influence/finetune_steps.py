"""The plan of a training: which rows every optimiser step takes, who takes them, at what rate.

All of it is a function of the seed and the step, so that a training that goes on from a checkpoint
takes the very steps that it would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Steps:
    """The optimiser steps over `rows` rows, `batch_size` at a time; an epoch's last has the rest.

    Every epoch goes through all rows in an order of its own; a broken number of epochs ends within
    one.
    """

    rows: int
    batch_size: int
    epochs: float
    seed: int

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.rows // self.batch_size)

    @property
    def total(self) -> int:
        """All steps."""
        # 0.3 epochs of 10 steps are 3, though 0.3 * 10 may be a little more in floating point.
        return max(1, math.ceil(self.epochs * self.per_epoch - 1e-9))

    def rows_of(self, step: int) -> Int[np.ndarray, " b"]:
        """The rows of a step, counted from 0."""
        epoch, place = divmod(step, self.per_epoch)
        first = place * self.batch_size
        return _order(self.rows, self.seed, epoch)[first : first + self.batch_size]

    @property
    def ends(self) -> list[int]:
        """The steps after which each epoch ends, the last one's where training does."""
        return [
            min(self.total, first + self.per_epoch)
            for first in range(0, self.total, self.per_epoch)
        ]

    def due(self, done: int, every: int | None) -> bool:
        """Whether what happens every so many steps (None: every epoch) happens after `done`."""
        return done >= self.total or done % (every or self.per_epoch) == 0


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    generator = np.random.default_rng([seed, 0x0DE4])
    order = generator.permutation(rows)
    for _ in range(epoch):
        order = generator.permutation(rows)
    return order


def rate_factor(step: int, steps: int, warmup_ratio: float, schedule: str) -> float:
    """The learning rate of a step (from 0) as a part of the highest.

    It rises linearly over the first ceil(warmup_ratio steps), then falls towards 0 as the schedule
    says. No step has a rate of 0, which would be a step wasted, and of few steps many.
    """
    rising = min(steps, math.ceil(warmup_ratio * steps))
    if step < rising:
        return (step + 1) / rising
    done = min(1.0, (step - rising + 1) / (steps - rising + 1))
    if schedule == "constant":
        return 1.0
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def epoch_rates(
    steps: Steps, learning_rate: float, warmup_ratio: float, schedule: str
) -> list[float]:
    """The mean learning rate of each epoch's steps; of a broken last one as far as it goes.

    LESS (Xia et al., arXiv 2402.04333, section 2) weighs an epoch's checkpoint with it.
    """
    rates = [
        learning_rate * rate_factor(step, steps.total, warmup_ratio, schedule)
        for step in range(steps.total)
    ]
    epochs = range(0, steps.total, steps.per_epoch)
    return [math.fsum(own) / len(own) for own in (rates[e : e + steps.per_epoch] for e in epochs)]


def share_of(lengths: Sequence[int], worker: int, workers: int) -> list[int]:
    """The positions that one of several workers takes: longest first, dealt out in turn.

    The workers wait for each other after every step, so each should have about as many tokens.
    """
    ordered = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return ordered[worker::workers]


def mean_one(weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The weights scaled to a mean of 1; equal ones become exactly 1."""
    if not len(weights) or (weights == weights[0]).all():
        return np.ones(len(weights))
    return weights * (len(weights) / weights.sum())


def effective_rows(weights: Float[np.ndarray, " n"]) -> float:
    """How many equally weighted rows would have the same spread: (sum w)^2 / sum w^2."""
    return float(weights.sum() ** 2 / np.square(weights).sum()) if len(weights) else 0.0
