"""The report's table of what was planned and what it took."""

from __future__ import annotations

from dataclasses import dataclass

from influence.bill_tables import footnotes
from influence.plan_schemas import Amounts, Bill, StageBill
from influence.report_format import amount, money, seconds, size

_NAMES = ("shards", "rows", "tokens", "flops", "written_bytes", "objects", "seconds", "gpu_hours")
_NAMES += ("node_hours", "money")
# Sums over stages that each take the same rows say nothing.
_NOT_IN_TOTAL = ("shards", "rows")


@dataclass(frozen=True)
class BillLine:
    """One line of the table: the stage (in its first line), what the line says, the numbers."""

    name: str
    word: str
    cells: list[str]


def bill_lines(bill: Bill) -> list[BillLine]:
    """Planned, at most, taken and ratio of every stage that had anything to do, then the total."""
    lines = []
    for name, stage in (*bill.stages.items(), ("total", bill.total)):
        amounts = [("planned", stage.planned), ("at most", stage.at_most), ("took", stage.took)]
        if not any(a is not None and (a.shards or a.objects or a.seconds) for _, a in amounts):
            continue
        names = [n for n in _NAMES if n != "money" or bill.node_hour is not None]
        for word, each in amounts:
            if each is not None:
                cells = [_cell(name, n, each) for n in names]
                lines.append(BillLine(name if word == "planned" else "", word, cells))
        if stage.ratio:
            lines.append(BillLine("", "ratio", [_ratio(name, n, stage) for n in names]))
    return lines


def bill_caption(bill: Bill) -> str:
    """What the lines mean, and what the estimate was made from."""
    text = "Planned when the run began: what the cache did not hold."
    if any(stage.at_most is not None for stage in bill.stages.values()):
        text += " At most: where the rounds decided how much; the ratio is 1 between the two."
    return f"{text} {'. '.join(line[0].upper() + line[1:] for line in footnotes(bill))}."


def _cell(stage: str, name: str, amounts: Amounts) -> str:
    value = getattr(amounts, name)
    if not value or (stage == "total" and name in _NOT_IN_TOTAL):
        return ""
    if name == "written_bytes":
        return size(value)
    if name == "seconds":
        return seconds(value)
    if name in ("gpu_hours", "node_hours", "money"):
        return money(value)
    return amount(value)


def _ratio(stage: str, name: str, bill: StageBill) -> str:
    value = bill.ratio.get(name)
    if value is None or (stage == "total" and name in _NOT_IN_TOTAL):
        return ""
    return f"{value:.2f}"
