"""Evaluations in the report: below a run's selection, or on a page of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from influence import storage
from influence.evaluation_tables import parse_evaluation, result_figures
from influence.evaluations import ResultTable
from influence.plots import Plot
from influence.records import Manifest
from influence.report_data import optional_bytes, optional_document
from influence.report_page import render_page


@dataclass(frozen=True)
class Made:
    """How one evaluation was made: its run's state, config and versions of packages."""

    name: str
    state: str
    config_text: str
    versions: dict[str, str]


def shown_evaluations(run_url: str, raw: bytes) -> list[tuple[ResultTable, Sequence[Plot]]]:
    """(table, figures) of every result in evaluation.json.

    Raises:
        InputError: a result that this version did not write.
    """
    return result_figures(run_url, parse_evaluation(run_url, raw))


def render_evaluation(run_url: str, raw: bytes) -> str:
    """The page of a directory without a selection.

    Raises:
        InputError: a document there cannot be understood.
    """
    made = [
        each
        for name in parse_evaluation(run_url, raw)
        if (each := _made(storage.join(run_url, "evaluations", name), name)) is not None
    ]
    context = {
        "url": run_url,
        "title": "Evaluation",
        "evaluations": shown_evaluations(run_url, raw),
        "made": made,
        "unfinished": [each for each in made if each.state != "done"],
    }
    return render_page("evaluation_report.html.j2", context)


def _made(run_url: str, name: str) -> Made | None:
    manifest = optional_document(Manifest, run_url, "manifest.json")
    text = optional_bytes(run_url, "config.yaml")
    if manifest is None or text is None:
        return None
    return Made(name, manifest.state, text.decode("utf-8", "replace"), manifest.versions)
