"""Certified selection: exact scores where they decide, in rounds, until the recall is known.

Uniform landmarks find the middle of the ranking and miss its head. So the regression's posterior
says which rows may belong to the selection; those get exact gradients; it is fitted again; and so
on until the recall that it states is what was asked for. A random audit of the rest then bounds
what was missed, whatever the posterior got wrong.

This module holds arrays and decisions. Where rows' scores and embeddings come from is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from influence.audit import Stratum, draw_sample, plan_audit
from influence.features import make_features
from influence.kernels import bandwidth_of
from influence.membership import Membership, interval, membership, on_threshold
from influence.posterior import (
    Calibration,
    Evidence,
    Posterior,
    calibrate,
    leave_one_out,
    no_evidence,
    observe,
    posterior_of,
)
from influence.records import Round
from influence.score_table import OverlaidTable, ScoreTable, scored_rows
from influence.selection import Rule, Selection
from influence.table_selection import Selected, select_table

# Up to here every exact row is inducing and the posterior is the process itself; beyond it this
# part of the inducing rows is uniform and the others are the first that the rounds acquired.
MAX_INDUCING, _UNIFORM_PART = 2048, 0.75
# The audit never takes more than this part of the exact rows beyond the first landmarks.
_AUDIT_PART = 0.25
# A round takes so much of the rows already exact, and of the members still expected, at least.
_GROWTH, _EXPECTED_PART, _SMALLEST_ROUND = 0.03, 0.5, 16

Kind = Literal["recall", "selected", "audit", "done"]


class Settings(NamedTuple):
    """recall: what is asked for. count: all exact rows together. audit: rows of the audit."""

    recall: float
    count: int
    audit: int
    kernel: str
    damping: float
    seed: int


def initial_landmarks(n: int, count: int, initial: int | None) -> int:
    """Uniform landmarks that the rounds begin with: `initial`, or 3.5 sqrt(n) of n rows.

    So many take 8 % of two thousand rows and 0.4 % of a million. Never more than a quarter of
    `count`, the exact rows in all, but four at least.
    """
    if initial is not None:
        return min(initial, count)
    return max(4, min(ceil(3.5 * sqrt(n)), count // 4))


def audit_rows(n: int, audit: int | None) -> int:
    """Rows of the audit: `audit`, or 1 % of n rows and 256 at least."""
    return audit if audit is not None else max(256, ceil(n / 100))


def rounds_at_most(initial: int, count: int) -> int:
    """About how many rounds it takes after the first landmarks until `count` rows are exact, if
    each is as small as rounds for recall are; with some for what would be selected on an estimate,
    and the audit."""
    exact, rounds = initial, 0
    while exact < count:
        exact += max(_SMALLEST_ROUND, ceil(_GROWTH * exact))
        rounds += 1
    return min(rounds + 4, count - initial)


def _inducing(known: int, uniform: int) -> Int[np.ndarray, " r"]:
    """Which of the exact rows, uniform ones first, span the features: all, or MAX_INDUCING."""
    if known <= MAX_INDUCING:
        return np.arange(known)
    acquired = min(known - uniform, MAX_INDUCING - min(uniform, int(_UNIFORM_PART * MAX_INDUCING)))
    from_uniform = _spread(uniform, MAX_INDUCING - acquired)
    return np.concatenate([from_uniform, uniform + np.arange(acquired)])


def _spread(count: int, limit: int) -> Int[np.ndarray, " k"]:
    """At most `limit` of `count` rows, evenly: uniform landmarks stand in the pool's order."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit


class Step(NamedTuple):
    """What to do next: which rows need exact scores, and why.

    `recall`: rows that may be members. `selected`: rows that would be handed out, or that
    set a threshold. `audit`: the random sample. `done`: none.
    """

    kind: Kind
    rows: Int[np.ndarray, " b"]


@dataclass(frozen=True)
class Known:
    """The exact rows in the order in which they were acquired. The first ones were uniform."""

    positions: Int[np.ndarray, " l"]
    X: Float[np.ndarray, "l e"]
    Y: Float[np.ndarray, "l m"]
    halves: Float[np.ndarray, "2 l m"] | None
    uniform: int

    def joined(
        self,
        positions: Int[np.ndarray, " b"],
        X: Float[np.ndarray, "b e"],
        Y: Float[np.ndarray, "b m"],
        halves: Float[np.ndarray, "2 b m"] | None,
    ) -> Known:
        """With further rows after these."""
        both = None
        if self.halves is not None and halves is not None:
            both = np.concatenate([self.halves, halves], axis=1)
        return Known(
            np.concatenate([self.positions, positions]),
            np.concatenate([self.X, X]),
            np.concatenate([self.Y, Y]),
            both,
            self.uniform,
        )


@dataclass
class Audit:
    """The audit: its strata, the rows drawn of each, and what a row has to exceed.

    That is the selection, and the rows that were exact, before any of the audit's scores was known.
    """

    strata: list[Stratum]
    samples: list[Int[np.ndarray, " drawn"]]
    selected: Selection
    before: Int[np.ndarray, " l"]


@dataclass
class Certified:
    """The rounds of one run. `keys` draw the audit; `named` turns columns into names' scores."""

    rule: Rule
    named: Float[np.ndarray, "m names"]
    keys: UInt64[np.ndarray, " n"]
    settings: Settings
    known: Known | None = None
    table: ScoreTable | None = None
    selected: Selected | None = None
    posterior: Posterior | None = None
    calibration: Calibration | None = None
    rounds: list[Round] = field(default_factory=list)
    audit: Audit | None = None
    belief: Membership | None = None
    # Predicted probability of every row that was acquired later, by position.
    predicted: dict[int, float] = field(default_factory=dict)

    def add(
        self,
        positions: Int[np.ndarray, " b"],
        X: Float[np.ndarray, "b e"],
        Y: Float[np.ndarray, "b m"],
        halves: Float[np.ndarray, "2 b m"] | None,
    ) -> None:
        """Exact scores of rows; the first ones are taken for uniformly drawn."""
        X = np.asarray(X, dtype=np.float64)
        if self.known is None:
            self.known = Known(positions, X, Y, halves, len(positions))
            return
        if self.belief is not None:
            self.predicted |= {
                int(p): float(self.belief.probability[p]) for p in positions.tolist()
            }
        self.known = self.known.joined(positions, X, Y, halves)

    def fit(self) -> Posterior:
        """The process after all exact rows; what it believes of every row is asked for next."""
        known, before = self._known, self.posterior
        uniform = slice(0, known.uniform)
        inducing = known.X[_inducing(len(known.X), known.uniform)]
        if before is not None and np.array_equal(before.evidence.features.inducing, inducing):
            evidence, seen = before.evidence, before.evidence.rows
        else:
            evidence, seen = self._prior(inducing), 0
        self.posterior = posterior_of(observe(evidence, known.X[seen:], known.Y[seen:]))
        left_out = leave_one_out(self.posterior, known.X[uniform], known.Y[uniform])
        self.calibration = calibrate(left_out)
        return self.posterior

    def next_step(self, believed: ScoreTable, barred: Int[np.ndarray, " x"]) -> Step:
        """Which rows to acquire, after what the process believes of every row with an embedding.

        `believed` is of the last `fit`; the exact rows' scores are laid over it here. `barred`:
        rows that cannot be scored after all.
        """
        known = self._known
        order = np.argsort(known.positions)
        self.table = OverlaidTable(
            believed, known.positions[order], known.Y[order], np.sort(np.asarray(barred, np.int64))
        )
        return self._decide()

    def _prior(self, inducing: Float[np.ndarray, "r e"]) -> Evidence:
        """Bandwidth, ridge and mean are those of the uniform landmarks in every round."""
        known, settings = self._known, self.settings
        uniform = known.X[: known.uniform]
        some = uniform[_spread(known.uniform, MAX_INDUCING)]
        features = make_features(
            inducing, kernel=settings.kernel, bandwidth=bandwidth_of(settings.kernel, some)
        )
        scale = float(features.diagonal(uniform).mean())
        ridge = settings.damping * (scale if scale > 0 else 1.0)
        return no_evidence(features, ridge=ridge, mean=known.Y[: known.uniform].mean(axis=0))

    def _decide(self) -> Step:
        exact, settings, table = self.exact, self.settings, self.table
        assert table is not None
        assert self.calibration is not None
        self.selected = select_table(self.rule, table)
        self.belief = membership(
            self.rule,
            table,
            exact,
            self.calibration,
            selected=self.selected,
            named=self.named,
            seed=settings.seed,
        )
        expected, low, high = interval(self.belief.recall)
        count = int(exact.sum())
        self.rounds.append(Round(exact=count, expected=expected, low=low, high=high))
        selected = self.selected.selection
        wanted = np.union1d(selected.order, on_threshold(self.rule, self.selected))
        wanted = wanted[~exact[wanted]]
        left = np.flatnonzero(~exact & scored_rows(table))
        room = settings.count - count
        # The audit's rows are kept free while the others are enough to make the selection exact.
        free = room if self.audit is not None else room - min(self.audit_size, len(left))
        if low < settings.recall:
            rows = self._likeliest(free)
            if rows.size:
                return Step("recall", rows)
        if wanted.size and room > 0:
            take = free if free >= wanted.size else room
            return Step("selected", self._by_probability(wanted)[:take])
        audit = min(self.audit_size, room, len(left))
        if wanted.size or self.audit is not None or audit < 1:
            return Step("done", np.empty(0, dtype=np.int64))
        return Step("audit", self._draw_audit(left, audit, selected))

    @property
    def audit_size(self) -> int:
        """Rows of the audit, limited so that it never leaves the rounds without gradients."""
        beyond = self.settings.count - self._known.uniform
        return min(self.settings.audit, ceil(_AUDIT_PART * beyond))

    def _likeliest(self, room: int) -> Int[np.ndarray, " b"]:
        """The rows most likely to be members, as many as a round takes."""
        assert self.belief is not None
        probability = self.belief.probability
        ranked = self._by_probability(np.flatnonzero((probability > 0) & ~self.exact))
        part = round(_EXPECTED_PART * float(probability.sum()))
        take = max(_SMALLEST_ROUND, ceil(_GROWTH * self.exact.sum()), part)
        return ranked[: max(0, min(take, room))]

    def _by_probability(self, rows: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        assert self.belief is not None
        return rows[np.lexsort((self.rule.ranks[rows], -self.belief.probability[rows]))]

    def _draw_audit(
        self, left: Int[np.ndarray, " u"], count: int, selected: Selection
    ) -> Int[np.ndarray, " b"]:
        assert self.belief is not None
        plan = plan_audit(self.belief.probability[left], count)
        samples = [left[draw_sample(self.keys[left], stratum)] for stratum in plan]
        self.audit = Audit(plan, samples, selected, self._known.positions)
        return np.concatenate(samples)

    @property
    def exact(self) -> Bool[np.ndarray, " n"]:
        """Which rows of the pool have exact scores."""
        found = np.zeros(len(self.keys), dtype=bool)
        found[self._known.positions] = True
        return found

    @property
    def _known(self) -> Known:
        if self.known is None:
            raise RuntimeError("the landmarks' scores come first")
        return self.known


def step_text(certified: Certified, step: Step) -> str:
    """A line on the state of the rounds and what comes next."""
    last = certified.rounds[-1]
    state = (
        f"{last.exact:,} exact rows, recall {last.expected:.3f} [{last.low:.3f}, {last.high:.3f}]"
    )
    rows = len(step.rows)
    if step.kind == "done" and last.low < certified.settings.recall:
        state += (
            f", less than the {certified.settings.recall:g} asked for: landmarks.count is spent"
        )
    follows = {
        "recall": f"{rows:,} rows that may be selected",
        "selected": f"{rows:,} rows that would be selected on an estimate",
        "audit": f"audit of {rows:,} random rows",
        "done": "done",
    }
    return f"round {len(certified.rounds)}: {state}; next: {follows[step.kind]}"
