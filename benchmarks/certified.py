"""Does a certified selection find what it says? Every exact score known, the rounds played.

The truth are the scores of a run with `method: exact`; embeddings are read from its cache, where an
`influence_distillation` run over the same pool left them. For each target, way of combining its
columns, budget and seed the rounds of `landmarks: {choose: certified}` are played with those
scores; beside them as many uniform landmarks, and the least number that could do (the budget).

    python benchmarks/certified.py runs/pool2000/exact-both --target gsm8k --target bbh \
        --budget 2% --budget 5% --budget 10% --seeds 3 --audit 64 --json certified.json

`--curve` plays the acquisition alone, without a stop: true recall against exact gradients for
uniform rows, k-means++ in the embeddings, the largest predicted scores, and the posterior.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import read_scores, write_json
from jaxtyping import Float, Int

from influence import landmarks
from influence.budget import parse_budget
from influence.certified import Certified, Settings, Step, audit_rows, initial_landmarks
from influence.certified_result import recall_certificate
from influence.config_loading import load_config
from influence.errors import InfluenceError, InputError
from influence.landmarks import row_keys
from influence.pipeline import catalogue_units, embedding_units, prepare
from influence.predictor import Mapper, posterior_predictor
from influence.progress import Progress
from influence.reducer import Reducer
from influence.score_table import ArrayTable, rows_of
from influence.selection import Rule
from influence.shard_reader import read_embeddings
from influence.weights import id_ranks

CURVE = ("uniform", "kmeans++", "largest", "posterior")


@dataclass(frozen=True)
class Pool:
    """Rows with exact scores for every column: embeddings, scores by column name, digests."""

    X: Float[np.ndarray, "n e"]
    scores: dict[str, Float[np.ndarray, " n"]]
    digests: list[bytes]
    ids: list[str]

    def columns(self, target: str) -> Float[np.ndarray, "n m"]:
        """The scores of a target's groups, or of the target where it has none."""
        names = [name for name in self.scores if name.startswith(f"{target}/")] or [target]
        missing = [name for name in names if name not in self.scores]
        if missing:
            raise InputError(f"--target {target}: expected some of {', '.join(self.scores)}")
        return np.stack([self.scores[name] for name in names], axis=1)


def read_pool(run: str) -> Pool:
    """Scores of an exact run, and the embeddings that its cache holds of the same rows."""
    config = load_config(f"{run.rstrip('/')}/config.yaml")
    job = prepare(config, Progress(quiet=True))
    reducer = Reducer(config)
    reducer.load_catalogue(*catalogue_units(job))
    catalogue = reducer.pool
    assert catalogue is not None
    X = read_embeddings(reducer.cache, embedding_units(job), catalogue, catalogue.eligible)
    table = read_scores(run)
    where = {name: row for row, name in enumerate(table.column("id").to_pylist())}
    at = [where[catalogue.ids[position]] for position in catalogue.eligible]
    scores = {
        name.removeprefix("score."): table.column(name).to_numpy(zero_copy_only=False)[at]
        for name in table.column_names
        if name.startswith("score.")
    }
    kept = np.isfinite(X).all(axis=1) & np.isfinite(np.stack(list(scores.values()))).all(axis=0)
    positions = catalogue.eligible[kept]
    return Pool(
        X[kept],
        {name: values[kept] for name, values in scores.items()},
        [catalogue.digests[position] for position in positions],
        [catalogue.ids[position] for position in positions],
    )


@dataclass(frozen=True)
class Case:
    """One question to a pool: which rule on which columns, with which seed."""

    Y: Float[np.ndarray, "n m"]
    rule: Rule
    seed: int


def rule_of(pool: Pool, columns: int, budget: str, combine: str) -> Rule:
    """The rule of one target with so many columns."""
    zeros = np.zeros(columns, dtype=np.int64)
    return Rule(zeros, id_ranks(pool.ids), parse_budget(budget), combine)


def play(
    pool: Pool, case: Case, *, recall: float, audit: int | None, kernel: str
) -> dict[str, Any]:
    """The rounds of one case: claims, truth, and the exact rows that each kind of step took."""
    n = len(pool.X)
    settings = Settings(recall, n, audit_rows(n, audit), kernel, 0.01, case.seed)
    keys = row_keys(case.seed, pool.digests, purpose=b"audit")
    named = np.full((case.Y.shape[1], 1), 1.0 / case.Y.shape[1])
    rounds = Certified(case.rule, named, keys, settings)
    rows, taken, start = first_landmarks(pool, case.seed), {}, time.perf_counter()
    kind = "uniform"
    while True:
        taken[kind] = taken.get(kind, 0) + len(rows)
        rounds.add(rows, pool.X[rows], case.Y[rows], None)
        step = next_step(rounds, pool)
        kind, rows = step.kind, step.rows
        if kind == "done":
            break
    claim = recall_certificate(rounds)
    found = claim.selection
    truth = case.rule(case.Y).order
    assert rounds.selected is not None
    true = float(np.isin(truth, rounds.selected.selection.order).mean())
    exact = int(rounds.exact.sum())
    return {
        "k": len(truth),
        "exact": exact,
        "share": exact / n,
        "taken": taken,
        "rounds": len(claim.rounds),
        "claimed": found.expected,
        "low": found.low,
        "high": found.high,
        "audit_low": found.audit_low,
        "recall": true,
        "uniform": uniform_recall(pool, case, exact, kernel),
        "seconds": time.perf_counter() - start,
        "reliability": [each.model_dump() for each in claim.reliability],
    }


def first_landmarks(pool: Pool, seed: int) -> Int[np.ndarray, " l"]:
    """The uniform landmarks that a run of this seed begins with."""
    count = initial_landmarks(len(pool.X), len(pool.X), None)
    return landmarks.choose_uniform(row_keys(seed, pool.digests), count)


def next_step(rounds: Certified, pool: Pool) -> Step:
    """Fit, predict the pool, and ask for the next rows: what a run does over its shards."""
    predicted = Mapper(posterior_predictor(rounds.fit(), lengths=False))(pool.X)
    return rounds.next_step(ArrayTable(*predicted), np.empty(0, dtype=np.int64))


def uniform_recall(pool: Pool, case: Case, count: int, kernel: str) -> float:
    """True recall of the plain regression with so many uniform landmarks."""
    rows = landmarks.choose_uniform(row_keys(case.seed, pool.digests), count)
    return recall_with(pool, case, rows, kernel)


def recall_with(pool: Pool, case: Case, rows: Int[np.ndarray, " l"], kernel: str) -> float:
    """True recall of the selection by these rows' exact scores and the regression on them."""
    model = landmarks.fit(pool.X[rows], case.Y[rows], kernel=kernel)
    P = landmarks.predict(model, pool.X)
    P[rows] = case.Y[rows]
    return float(np.isin(case.rule(case.Y).order, case.rule(P).order).mean())


def curve(pool: Pool, case: Case, counts: Sequence[int], kernel: str) -> dict[str, list[float]]:
    """True recall at these numbers of exact rows, for every way of choosing them."""
    choose: dict[str, Callable[[int], Int[np.ndarray, " l"]]] = {
        "uniform": lambda c: landmarks.choose_uniform(row_keys(case.seed, pool.digests), c),
    }
    spread_out = plus_plus(pool.X, max(counts), case.seed)
    choose["kmeans++"] = lambda c: np.sort(spread_out[:c])
    for name in ("largest", "posterior"):
        order = acquired(pool, case, max(counts), kernel, by_probability=name == "posterior")
        choose[name] = lambda c, order=order: np.sort(order[:c])
    return {
        name: [recall_with(pool, case, choose[name](count), kernel) for count in counts]
        for name in CURVE
    }


def plus_plus(X: Float[np.ndarray, "n e"], count: int, seed: int) -> Int[np.ndarray, " count"]:
    """k-means++ seeding (Arthur and Vassilvitskii, SODA 2007): by squared distance, in order."""
    draw = np.random.default_rng(seed)
    chosen = [int(draw.integers(len(X)))]
    nearest = np.full(len(X), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.square(X - X[chosen[-1]]).sum(axis=1, dtype=np.float64))
        nearest[chosen] = 0.0
        chosen.append(int(draw.choice(len(X), p=nearest / nearest.sum())))
    return np.asarray(chosen)


def acquired(
    pool: Pool, case: Case, count: int, kernel: str, *, by_probability: bool
) -> Int[np.ndarray, " count"]:
    """Rows in the order in which rounds take them: likeliest members, or largest predictions."""
    n = len(pool.X)
    settings = Settings(1.0, n, 1, kernel, 0.01, case.seed)
    named = np.full((case.Y.shape[1], 1), 1.0 / case.Y.shape[1])
    rounds = Certified(case.rule, named, np.zeros(n, np.uint64), settings)
    order = first_landmarks(pool, case.seed)
    rounds.add(order, pool.X[order], case.Y[order], None)
    while len(order) < count:
        step = next_step(rounds, pool)
        rows = step.rows
        if not by_probability or step.kind != "recall":
            take = max(16, len(rows) if step.kind == "recall" else 0)
            assert rounds.table is not None
            best = (rows_of(rounds.table, np.arange(n)).P @ case.rule.decides()).max(axis=1)
            best[rounds.exact] = -np.inf
            rows = np.argsort(-best, kind="stable")[: min(take, n - len(order))]
        rounds.add(rows, pool.X[rows], case.Y[rows], None)
        order = np.concatenate([order, rows])
    return order[:count]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases; one line each while they are played."""
    pool = read_pool(arguments.run)
    cases, curves = [], []
    for target in arguments.target:
        Y = pool.columns(target)
        for combine in arguments.combine:
            for budget in arguments.budget:
                for seed in range(arguments.seeds):
                    case = Case(Y, rule_of(pool, Y.shape[1], budget, combine), seed)
                    names = {"target": target, "combine": combine, "budget": budget, "seed": seed}
                    if arguments.curve:
                        counts = [round(share * len(pool.X)) for share in arguments.shares]
                        curves.append({**names, **curve(pool, case, counts, arguments.kernel)})
                        continue
                    options = {"recall": arguments.recall, "audit": arguments.audit}
                    found = play(pool, case, kernel=arguments.kernel, **options)
                    cases.append({**names, **found})
                    print(line(cases[-1]), flush=True)
    return {
        "rows": len(pool.X),
        "recall": arguments.recall,
        "audit": audit_rows(len(pool.X), arguments.audit),
        "kernel": arguments.kernel,
        "shares": arguments.shares,
        "cases": cases,
        "curves": curves,
    }


def line(case: dict[str, Any]) -> str:
    """One case in words."""
    return (
        f"{case['target']} {case['combine']} {case['budget']} seed {case['seed']}: "
        f"{case['exact']} exact ({case['share']:.1%}) in {case['rounds']} rounds, claimed "
        f"{case['claimed']:.3f} [{case['low']:.3f}, {case['high']:.3f}], audit >= "
        f"{case['audit_low'] or 0:.3f}, true {case['recall']:.3f}, uniform {case['uniform']:.3f}"
    )


def summary(found: dict[str, Any]) -> str:
    """Means over seeds as a table, and how often the claims held."""
    cases = found["cases"]
    lines = []
    if cases:
        lines += [
            "| target | combine | budget | exact rows | of them audit | share | claimed recall "
            "| true recall | audit, at least | uniform, as many | least possible |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for case in cases:
            groups.setdefault((case["target"], case["combine"], case["budget"]), []).append(case)
        for (target, combine, budget), members in groups.items():

            def mean(key: str, members: list[dict[str, Any]] = members) -> float:
                return float(np.mean([case[key] or 0 for case in members]))

            audited = np.mean([case["taken"].get("audit", 0) for case in members])
            lines.append(
                f"| {target} | {combine} | {budget} | {mean('exact'):.0f} | {audited:.0f} "
                f"| {mean('share'):.1%} | {mean('claimed'):.3f} | {mean('recall'):.3f} "
                f"| {mean('audit_low'):.3f} | {mean('uniform'):.3f} "
                f"| {mean('k') / found['rows']:.1%} |"
            )
        inside = sum(case["low"] <= case["recall"] <= case["high"] for case in cases)
        held = sum(case["audit_low"] <= case["recall"] for case in cases)
        lines += [
            "",
            f"{len(cases)} cases: the audit's bound held in {held}, the interval covered the truth "
            f"in {inside}; mean true recall {np.mean([case['recall'] for case in cases]):.3f}, "
            f"claimed {np.mean([case['claimed'] for case in cases]):.3f}.",
        ]
    if found["curves"]:
        shares = " | ".join(f"{share:.0%}" for share in found["shares"])
        lines += [f"| target | combine | budget | chosen | {shares} |"]
        lines += ["|---|---|---|---|" + "---:|" * len(found["shares"])]
        keys = dict.fromkeys((c["target"], c["combine"], c["budget"]) for c in found["curves"])
        for key in keys:
            members = [
                c for c in found["curves"] if (c["target"], c["combine"], c["budget"]) == key
            ]
            for name in CURVE:
                values = np.mean([member[name] for member in members], axis=0)
                cells = " | ".join(f"{value:.3f}" for value in values)
                lines.append(f"| {' | '.join(key)} | {name} | {cells} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="directory of a run with method: exact")
    add("--target", action="append", required=True)
    add("--combine", nargs="+", default=["mean", "round_robin"])
    add("--budget", action="append")
    add("--seeds", type=int, default=3)
    add("--recall", type=float, default=0.95)
    add("--audit", type=int, help="rows of the audit; default as in a run")
    add("--kernel", default="laplace", choices=sorted(landmarks.KERNELS))
    add("--curve", action="store_true")
    add("--shares", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5])
    add("--json", type=Path)
    arguments = parser.parse_args(argv)
    arguments.budget = arguments.budget or ["2%", "5%", "10%"]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Play, print, and write the JSON if asked to; returns the exit code."""
    arguments = parse(argv)
    try:
        found = run(arguments)
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    if arguments.json:
        write_json(arguments.json, found)
    print(summary(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
