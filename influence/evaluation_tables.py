"""RUN/evaluation.json: reading it, and the tables that terminal and report show of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
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
    """The results of `read_evaluation` as tables.

    Raises:
        InputError: a result that this version did not write.
    """
    return _each(run, found, lambda evaluation, document: evaluation.table(document))


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


def terminal_table(result: ResultTable) -> Table:
    """A result for the terminal. Names out of the data stand as they are."""
    table = Table(title=result.title, caption=Text(result.caption), caption_justify="left")
    for index, heading in enumerate(result.headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in result.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
