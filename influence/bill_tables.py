"""The bill on a terminal: what is planned, and what it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from influence.plan_schemas import Amounts, Bill, StageBill
from influence.report_format import DASH, amount, money, short_seconds, short_size
from influence.status import compact_table

_PLANNED = ("rows", "tokens", "FLOP", "read", "written", "time")
_FIRST = ("catalogue", "contamination")  # made for the plan itself
_TAKEN = ("rows", "tokens", "FLOP", "written", "objects", "time")


def plan_table(bill: Bill) -> Table:
    """What is left to do: a line for each stage, and one for its most where the run decides."""
    done = sum(stage.cached for name, stage in bill.stages.items() if name not in _FIRST)
    table = compact_table(title="work that is left" if done else "work")
    headings = ("stage", "shards\ncached", "shards\nto do", *_PLANNED, *_priced(bill))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for name, stage in bill.stages.items():
        shards = ("", "")
        if stage.shards:
            shards = (_count(stage.cached), _count(stage.planned.shards))
        table.add_row(Text(name), *shards, *_cells(stage.planned, bill))
        if stage.at_most is not None:
            at_most = _count(stage.at_most.shards) if stage.shards else ""
            table.add_row("  at most", "", at_most, *_cells(stage.at_most, bill))
    table.add_section()
    table.add_row("total", "", "", "", *_cells(bill.total.planned, bill)[1:])
    if bill.total.at_most is not None:
        table.add_row("  at most", "", "", "", *_cells(bill.total.at_most, bill)[1:])
    return table


def footnotes(bill: Bill) -> list[str]:
    """What the hours and the money are made from, and where the speeds are from."""
    gpus = f" of {bill.replica.num_gpus:g} GPU" if bill.replica.num_gpus else ""
    line = f"time: {bill.replicas:,} replica{'s' * (bill.replicas != 1)}{gpus} at once"
    if bill.node_hour is not None:
        price = f"{bill.node_hour:g} {bill.currency}"
        line += f" on {bill.nodes:,} node{'s' * (bill.nodes != 1)} at {price} an hour"
    else:
        line += "; for money, set prices.node_hour"
    if bill.set_up:
        line += f"; {short_seconds(bill.set_up_seconds)} to set one up ({bill.set_up})"
    planned, most = bill.total.planned.objects, bill.total.at_most
    objects = f"objects to be written: {planned or 0:,}"
    if most is not None:
        objects += f", at most {most.objects:,}"
    found = _sources((name, stage.speed) for name, stage in bill.stages.items())
    return [objects, line, *(f"speed of {each}" for each in found)]


def bill_table(bill: Bill) -> Table:
    """Planned and taken, stage by stage, and how many times the plan it was."""
    table = compact_table(title="planned and taken")
    headings = ("stage", "", "shards", *_TAKEN, *_priced(bill))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("stage", "") else "right")
    for name, stage in (*bill.stages.items(), ("total", bill.total)):
        if stage.took is None or not (_any(stage.planned) or _any(stage.took)):
            continue
        if name == "total":
            table.add_section()
        _bill_rows(table, name, stage, bill)
    return table


def _bill_rows(table: Table, name: str, stage: StageBill, bill: Bill) -> None:
    """Up to four lines: planned, at most, taken, and their ratio."""
    assert stage.took is not None
    lines = [("planned", stage.planned), ("at most", stage.at_most), ("took", stage.took)]
    for word, amounts in lines:
        if amounts is not None:
            cells = [_count(amounts.shards), *_cells(amounts, bill, _TAKEN)]
            if name == "total":
                cells[:2] = ["", ""]
            table.add_row(Text(name if word == "planned" else ""), word, *cells)
    names = ["shards", "rows", "tokens", "flops", "written_bytes", "objects", "seconds"]
    names += ["gpu_hours"] if "GPU-h" in _priced(bill) else []
    names += ["money"] if bill.node_hour is not None else []
    cells = [_ratio(stage.ratio, each) for each in names]
    if name == "total":
        cells[:2] = ["", ""]
    table.add_row("", "ratio", *cells)


def _ratio(ratio: Mapping[str, float], name: str) -> str:
    value = ratio.get(name)
    return "" if value is None else f"{value:.2f}"


def _any(amounts: Amounts) -> bool:
    """Whether there is anything in it worth a line: shards, objects, or half a second."""
    return bool(amounts.shards or amounts.objects or amounts.seconds >= 0.5)


def _cells(amounts: Amounts, bill: Bill, columns: Sequence[str] = _PLANNED) -> list[str]:
    shown = {
        "rows": _amount(amounts.rows),
        "tokens": _amount(amounts.tokens),
        "FLOP": _amount(amounts.flops),
        "read": _size(amounts.read_bytes),
        "written": _size(amounts.written_bytes),
        "objects": _amount(amounts.objects),
        "time": short_seconds(amounts.seconds) if amounts.seconds else "",
        "GPU-h": money(amounts.gpu_hours) if amounts.gpu_hours else "",
        bill.currency: money(amounts.money) if amounts.money else "",
    }
    return [shown[column] for column in (*columns, *_priced(bill))]


def _priced(bill: Bill) -> list[str]:
    """Columns that a bill has only with GPUs, and only with a price."""
    columns = ["GPU-h"] if bill.replica.num_gpus > 0 else []
    return columns + ([bill.currency] if bill.node_hour is not None else [])


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _amount(value: float | None) -> str:
    return amount(value) if value else ""


def _size(value: int | None) -> str:
    if value is None:
        return DASH
    return short_size(value) if value else ""


def _sources(speeds: Iterable[tuple[str, str]]) -> list[str]:
    """Lines that name the stages of every source, in the order of the stages."""
    by_source: dict[str, list[str]] = {}
    for stage, source in speeds:
        if source:
            by_source.setdefault(source, []).append(stage)
    return [f"{', '.join(stages)}: {source}" for source, stages in by_source.items()]
