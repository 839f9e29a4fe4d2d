"""The results of gradients.py as JSON fields and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.table import Table


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the JSON: a number per round, the highest memory, and what the worker added.

    Where the projection is counted apart, `tokens_per_s` leaves it out (a bound that no projection
    can beat) and `tokens_per_s_projected` has it in.
    """
    own = {"seconds", "tokens", "peak_mb", "model_mb", "peak_over_model_mb", "projection_seconds"}
    row: dict[str, Any] = {
        "tokens_per_s": [a["tokens"] / a["seconds"] for a in answers],
        "seconds": [a["seconds"] for a in answers],
        "tokens": answers[0]["tokens"],
        "peak_mb": max(a["peak_mb"] for a in answers),
        "model_mb": answers[0]["model_mb"],
        "peak_over_model_mb": max(a["peak_over_model_mb"] for a in answers),
    }
    if "projection_seconds" in answers[0]:
        row["projection_seconds"] = [a["projection_seconds"] for a in answers]
        row["tokens_per_s_projected"] = [
            a["tokens"] / (a["seconds"] + a["projection_seconds"]) for a in answers
        ]
    return {**row, **{key: value for key, value in answers[0].items() if key not in own}}


def spread(values: Sequence[float]) -> str:
    """Median (min-max)."""
    middle, low, high = (
        f"{value:,.0f}" if value >= 1 else f"{value:.2g}"
        for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({low}-{high})"


def speed_table(document: Mapping[str, Any]) -> Table:
    """Every row with its speeds; those that did not run, with the reason."""
    rounds = document["rounds"]
    table = Table(title=f"tokens/s, median (min-max) of {rounds} rounds; memory in MB")
    table.add_column("row", no_wrap=True)
    for heading in ("tokens/s", "with projection", "of training_step", "peak", "over the model"):
        table.add_column(heading, justify="right")
    table.add_column("tokens a batch", justify="right")
    rows = document["rows"]
    bound = median(rows["training_step"]["tokens_per_s"]) if "training_step" in rows else None
    for name, row in rows.items():
        speed = median(row["tokens_per_s"])
        projected = row.get("tokens_per_s_projected")
        table.add_row(
            name,
            spread(row["tokens_per_s"]),
            spread(projected) if projected else "",
            f"{speed / bound:.2f}" if bound else "",
            f"{row['peak_mb']:,.0f}",
            f"{row['peak_over_model_mb']:,.0f}",
            "one row" if row["token_budget"] == 1 else str(row["token_budget"]),
        )
    for name, reason in {**document["left_out"], **document["failed"]}.items():
        table.add_row(name, reason if name in document["left_out"] else "failed: see below")
    return table


def accuracy_table(accuracy: Mapping[str, Mapping[str, float]]) -> Table:
    """Correlations of projected cosines with unprojected ones, for both ways of normalising."""
    table = Table(title="cosines of row pairs against unprojected ones")
    for heading in (
        "projection",
        "bytes a row",
        "Pearson, exact norms",
        "Spearman, exact norms",
        "Pearson, own norms",
        "Spearman, own norms",
    ):
        table.add_column(heading, justify="left" if heading == "projection" else "right")
    for name, row in accuracy.items():
        table.add_row(
            name,
            str(row["bytes_per_row"]),
            f"{row['pearson_exact_norms']:.4f}",
            f"{row['spearman_exact_norms']:.4f}",
            f"{row['pearson_own_norms']:.4f}",
            f"{row['spearman_own_norms']:.4f}",
        )
    return table
