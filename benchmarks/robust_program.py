"""The robust objective's quadratic programme: seconds for a budget, and growth with the pool.

    python -m benchmarks.robust_program --json benchmarks/results/robust_program.json
    python -m benchmarks.robust_program --rows 10000000 --rank 32 --eta 1

Random gains and a random float32 factor whose columns fall in size, with a direction that all rows
share. Timed is `solve_budget` for each budget, in rounds, from pool and budget to proved weights.
Beside it the bound: one product with the factor, which the proof needs in any case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.common import memory_mb, summary, write_json
from influence.robust_program import BudgetSolution, solve_budget

BUDGETS = (0.05, 0.001)
BLOCK_ROWS = 50_000


def make_pool(
    rows: int, rank: int, seed: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n r"]]:
    """(gains c, factor B) with B B' of the size of (1/n) A H A'; a quarter of c follows B."""
    draw = np.random.default_rng(seed)
    sizes = (1 / np.sqrt(1 + np.arange(rank))).astype(np.float32)
    shared = 0.3 * draw.standard_normal(rank).astype(np.float32)
    target = draw.standard_normal(rank).astype(np.float32)
    factor, c = np.empty((rows, rank), np.float32), np.empty(rows)
    for first in range(0, rows, BLOCK_ROWS):
        block = draw.standard_normal((min(BLOCK_ROWS, rows - first), rank), np.float32) * sizes
        block += shared
        part = slice(first, first + len(block))
        factor[part] = block / np.float32(np.sqrt(rows))
        c[part] = 0.5 * draw.standard_normal(len(block)) + 0.5 * block @ target / np.sqrt(rank)
    return c, factor


def product_seconds(factor: Float[np.ndarray, "n r"], rounds: int) -> dict[str, float]:
    """One product of the factor, as it is stored, with a vector."""
    z = np.ones(factor.shape[1], factor.dtype)
    return summary([seconds_of(lambda: factor @ z)[0] for _ in range(rounds)])


def seconds_of(work: Any) -> tuple[float, Any]:
    """(seconds, what the work returned)."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def measure(rows: int, rank: int, eta: float, rounds: int) -> list[dict[str, Any]]:
    """One case for each budget."""
    c, factor = make_pool(rows, rank, 0)
    ranks = np.random.default_rng(1).permutation(rows)
    product = product_seconds(factor, rounds)
    seconds: dict[int, list[float]] = {max(1, round(share * rows)): [] for share in BUDGETS}
    found: dict[int, BudgetSolution] = {}
    for _ in range(rounds):
        for budget in seconds:
            spent, found[budget] = seconds_of(
                lambda k=budget: solve_budget(c, factor, ranks, eta=eta, budget=k)
            )
            seconds[budget].append(spent)
    return [
        case(found[budget], rows, rank, eta, summary(spent), product)
        for budget, spent in seconds.items()
    ]


def case(
    found: BudgetSolution,
    rows: int,
    rank: int,
    eta: float,
    seconds: dict[str, float],
    product: dict[str, float],
) -> dict[str, Any]:
    """The figures of one budget."""
    return {
        "rows": rows,
        "rank": rank,
        "eta": eta,
        "budget": found.budget,
        "support": found.support,
        "attainable": found.attainable,
        "lambda": found.solution.lam,
        "kkt": found.solution.kkt,
        "newton_steps": found.solution.iterations,
        "outside": found.outside,
        "bound": found.bound,
        "seconds": seconds,
        "product_seconds": product,
        "products": seconds["median"] / product["median"],
    }


def growth(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How the seconds grow from the smallest pool to the largest, for each share of the pool."""
    found = []
    for share in BUDGETS:
        some = [c for c in cases if c["budget"] == max(1, round(share * c["rows"]))]
        first, last = some[0], some[-1]
        if last["rows"] > first["rows"]:
            times = last["seconds"]["median"] / first["seconds"]["median"]
            exponent = np.log(times) / np.log(last["rows"] / first["rows"])
            found.append({"share": share, "times": times, "exponent": float(exponent)})
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, action="append", help="a size of the pool (may be repeated)")
    add("--rank", type=int, default=256)
    add("--eta", type=float, default=1.0)
    add("--rounds", type=int, default=3)
    add("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    arguments.rows = sorted(arguments.rows or [100_000, 1_000_000])
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    arguments = parse(argv)
    cases: list[dict[str, Any]] = []
    for rows in arguments.rows:
        for one in measure(rows, arguments.rank, arguments.eta, arguments.rounds):
            cases.append(one)
            spent = one["seconds"]
            print(
                f"{rows:>10,} rows, rank {one['rank']}, budget {one['budget']:>7,}: "
                f"{spent['median']:.2f} s ({spent['least']:.2f} to {spent['most']:.2f}), "
                f"{one['products']:.1f} products of {one['product_seconds']['median']:.3f} s; "
                f"support {one['support']:,}, KKT {one['kkt']:.1e}, bound {one['bound']:.2e}",
                flush=True,
            )
    for one in growth(cases):
        print(f"budget {one['share']:.1%}: {one['times']:.1f} times, n^{one['exponent']:.2f}")
    peak = memory_mb("VmHWM")
    print(f"peak memory {peak:,.0f} MB")
    if arguments.json:
        write_json(arguments.json, {"cases": cases, "growth": growth(cases), "peak_mb": peak})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
