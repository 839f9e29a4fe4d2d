"""What `influence plan` prints."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence.bill_tables import footnotes, plan_table
from influence.cost import ReplicaMemory
from influence.methods import METHODS
from influence.plan import Plan
from influence.status import compact_table


def print_plan(plan: Plan, console: Console) -> None:
    """The data, each stage's work and price, where the speeds are from, what gradients cover."""
    counts = plan.counts
    _line(
        console,
        f"candidates: {counts['rows']:,} rows, {counts['tokens']:,} tokens "
        f"({counts['response_tokens']:,} of responses); {counts['scored']:,} to be scored, "
        f"{counts['duplicates']:,} duplicates, {counts['truncated']:,} truncated",
    )
    for reason, count in counts["reasons"].items():
        _line(console, f"  not scored, {reason}: {count:,}")
    for name, target in counts["targets"].items():
        columns = target["columns"]
        _line(
            console,
            f"target {name}: {target['scored']:,} of {target['rows']:,} rows, {columns:,} score "
            f"column{'s' * (columns != 1)}, {target['tokens']:,} tokens",
        )
    _line(console, f"selection: {plan.selected}")
    console.print(plan_table(plan.bill))
    for line in footnotes(plan.bill):
        _line(console, line)
    if plan.memory is not None:
        _line(console, memory_line(plan.memory, plan.config.replicas.token_budget))
    if plan.shape is not None and METHODS[plan.config.method].needs_gradients:
        console.print(coverage_table(plan.shape.coverage))
    for note in plan.notes:
        _line(console, f"note: {note}")


def memory_line(memory: ReplicaMemory, token_budget: int) -> str:
    """What a replica needs, and for what."""
    parts = ", ".join(
        f"{name} {getattr(memory, name) / 1e9:.1f}"
        for name in (each.name for each in fields(memory))
        if name != "optimizer" or memory.optimizer
    )
    return (
        f"memory of a replica, estimated for batches of {token_budget:,} tokens: "
        f"{memory.total / 1e9:.1f} GB ({parts})"
    )


def coverage_table(rows: list[dict[str, Any]]) -> Table:
    """Which parameters the gradients cover; shares sum to 1."""
    table = compact_table(title="parameters that gradients are taken of")
    for heading in ("group", "parameters", "share", "rule", "attributed"):
        table.add_column(heading, justify="right" if heading in ("parameters", "share") else "left")
    for row in rows:
        table.add_row(
            Text(row["group"]),
            f"{row['parameters']:,}",
            f"{row['share']:.2%}",
            row["rule"] or "-",
            Text("yes" if row["attributed"] else f"no: {row['reason']}"),
        )
    return table


def _line(console: Console, text: str) -> None:
    """A line as it is: rich looks for neither markup nor emoji codes."""
    console.print(Text(text), highlight=False)
