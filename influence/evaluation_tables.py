"""RUN/evaluation.json: reading it, and the tables that terminal and report show of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from influence import storage
from influence.errors import InputError
from influence.evaluations import EVALUATIONS, ResultTable

FILE = "evaluation.json"


def read_evaluation(run: str) -> dict[str, Any]:
    """RUN/evaluation.json; {} if there is none.

    Raises:
        InputError: it is no JSON object.
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
    """The results of `read_evaluation` as they are shown.

    Raises:
        InputError: a result that this version did not write.
    """
    tables = []
    for name, document in found.items():
        if name not in EVALUATIONS:
            continue
        try:
            tables.append(EVALUATIONS[name].table(document))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise _unreadable(run, f"{place}: {first['msg']}") from None
    return tables


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
