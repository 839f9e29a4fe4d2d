"""The report's table and figure of what `layers: auto` chose, and of what it was held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence import plots
from influence.records import LayerChoice, LayerSubset

#: Lines of the table for each rule: its subsets nearest to these shares of the budget.
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class LayerReport:
    """What the page shows of the choice."""

    choice: LayerChoice
    modules: list[str]
    rows: list[LayerSubset]
    figure: plots.Plot | None


def layer_report(choice: LayerChoice | None) -> LayerReport | None:
    """The choice as it is shown; None for a run that chose no layers."""
    if choice is None:
        return None
    by_rule: dict[str, list[LayerSubset]] = {}
    for subset in choice.table:
        by_rule.setdefault(subset.rule, []).append(subset)
    rows: list[LayerSubset] = []
    for subsets in by_rule.values():
        for share in SHARES:
            fitting = [s for s in subsets if s.row_bytes <= share * choice.budget_row_bytes]
            if fitting and fitting[-1] not in rows:
                rows.append(fitting[-1])
    full = choice.full_row_bytes
    curves = {
        rule: (
            np.array([s.row_bytes / full for s in subsets]),
            np.array([s.held_out for s in subsets]),
        )
        for rule, subsets in by_rule.items()
    }
    figure = plots.layer_curves(
        curves,
        min(1.0, choice.budget_row_bytes / full),
        (choice.row_bytes / full, choice.held_out),
        f"Spearman of {len(choice.table):,} subsets of the layers with all of them, on pilot rows "
        "that they were not chosen on, against their share of the bytes.",
    )
    modules = list(dict.fromkeys(name.split(".lora_")[0] for name in choice.names))
    return LayerReport(choice, modules, rows, figure)
