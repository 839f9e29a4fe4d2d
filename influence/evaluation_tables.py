"""RUN/evaluation.json: reading it, and the tables that terminal and report show of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from influence import storage
from influence.errors import InputError
from influence.evaluations import EVALUATIONS, Evaluation, ResultTable

if TYPE_CHECKING:
    from influence.plots import Plot

Shown = TypeVar("Shown")

FILE = "evaluation.json"


def read_evaluation(run: str) -> dict[str, Any]:
    """RUN/evaluation.json; {} if there is none.

    Raises:
        InputError: it is no JSON object.

    Example:
        >>> influence.read_evaluation(config.run) == found
        True
    """
    url = storage.join(run, FILE)
    return {} if storage.head(url) is None else parse_evaluation(run, storage.read_bytes(url))


def parse_evaluation(run: str, data: bytes) -> dict[str, Any]:
    """The document out of the file's bytes.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        found = json.loads(data)
    except ValueError as error:
        raise _unreadable(run, f"no JSON ({error})") from None
    if not isinstance(found, dict):
        raise _unreadable(run, "no JSON object")
    return found


def result_tables(run: str, found: Mapping[str, Any]) -> list[ResultTable]:
    """The results of `read_evaluation` as tables, each one's further ones after it.

    Raises:
        InputError: a result that this version did not write.
    """
    first = _each(run, found, lambda evaluation, document: evaluation.table(document))
    return [table for result in first for table in (result, *result.further)]


def result_figures(run: str, found: Mapping[str, Any]) -> list[tuple[ResultTable, Sequence[Plot]]]:
    """The same with the figures of each, which may be none.

    Raises:
        InputError: a result that this version did not write.
    """
    return _each(run, found, lambda kind, document: (kind.table(document), kind.plots(document)))


def _each(
    run: str, found: Mapping[str, Any], show: Callable[[Evaluation, dict[str, Any]], Shown]
) -> list[Shown]:
    shown = []
    for name, document in found.items():
        if name not in EVALUATIONS:
            continue
        try:
            shown.append(show(EVALUATIONS[name], document))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise _unreadable(run, f"{place}: {first['msg']}") from None
    return shown


def _unreadable(run: str, what: str) -> InputError:
    url = storage.join(run, FILE)
    return InputError(f"{url}: {what}; run `influence evaluate CONFIG` again, or remove the file")


def terminal_tables(result: ResultTable, width: int) -> list[Table]:
    """A result for a terminal of so many columns, its first column again in every part.

    Names out of the data stand as they are; long ones take several lines, and nothing is cut off.
    """
    cells = [result.headings, *result.rows]
    widths = [max(cell_len(row[j]) for row in cells) + 3 for j in range(len(result.headings))]
    widths[0] = min(widths[0], width // 2)
    parts: list[list[int]] = [[]]
    for j in range(1, len(widths)):
        if parts[-1] and widths[0] + sum(widths[k] for k in parts[-1]) + widths[j] >= width:
            parts.append([])
        parts[-1].append(j)
    tables = []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        caption = Text(result.caption) if last else None
        table = Table(title=result.title, caption=caption, caption_justify="left")
        table.add_column(result.headings[0], max_width=widths[0] - 3, overflow="fold")
        for j in part:
            table.add_column(result.headings[j], justify="right", overflow="fold")
        for row in result.rows:
            if any(row[j] for j in part):
                table.add_row(*(Text(row[j]) for j in (0, *part)))
        tables.append(table)
    return tables
