"""The tables that a fine-tuning prints when it is done."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from influence.report_format import DASH, decimal
from influence.report_format import seconds as duration
from influence.training_record import TrainingRecord


def summary_tables(record: TrainingRecord) -> list[Table]:
    """Losses of the named sets before and after, and what the training was."""
    tables = [training_table(record)]
    return [losses_table(record), *tables] if record.evaluations else tables


def losses_table(record: TrainingRecord) -> Table:
    """Loss (mean over rows, nats per token) and perplexity before, at the best, and after."""
    table = Table(title="held-out loss and perplexity")
    for heading in ("set", "rows", "before", "after", "change", "lowest (step)", "perplexity"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    first, last = record.evaluations[0], record.evaluations[-1]
    for name, after in last.sets.items():
        before = first.sets[name]
        both = before.loss is not None and after.loss is not None
        known = [(e.sets[name].loss, e.step) for e in record.evaluations]
        finite = [(loss, step) for loss, step in known if loss is not None]
        lowest = min(finite) if finite else None
        table.add_row(
            Text(name),
            str(after.rows),
            decimal(before.loss, 4),
            decimal(after.loss, 4),
            decimal(after.loss - before.loss, 4) if both else DASH,  # type: ignore[operator]
            f"{lowest[0]:.4f} ({lowest[1]})" if lowest else DASH,
            f"{decimal(before.perplexity, 2)} → {decimal(after.perplexity, 2)}",
        )
    return table


def training_table(record: TrainingRecord) -> Table:
    """Rows, steps, speed."""
    table = Table(title="training")
    for heading in ("rows", "left out", "steps", "workers", "tokens", "seconds", "tokens/s"):
        table.add_column(heading, justify="right")
    speed = f"{record.tokens / record.seconds:,.0f}" if record.seconds else DASH
    table.add_row(
        f"{record.rows.trained:,}",
        f"{sum(record.rows.left_out.values()):,}",
        f"{record.total_steps:,}",
        str(record.workers),
        f"{record.tokens:,}",
        duration(record.seconds),
        speed,
    )
    return table
