"""What an evaluation puts into the report beside its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from run_fixture import write_run
from test_report import build

from influence import plots
from influence.evaluations import EVALUATIONS


def test_figures_of_an_evaluation_stand_below_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alt = "Slope <b>of</b> group_influence against its rows"

    def figures(document: dict) -> list[plots.Plot]:
        rows = [document["about"]["rows"], document["about"]["of"]]
        return [plots.drawn(lambda axes: axes.plot(rows, rows, color=plots.CHOSEN), alt)]

    with_figures = replace(EVALUATIONS["group_influence"], plots=figures)
    monkeypatch.setitem(EVALUATIONS, "group_influence", with_figures)  # pyright: ignore
    folder = write_run(tmp_path)
    effect = {"members": 1.0, "first": 2.0, "second": 3.0}
    about = {"run": "r", "rows": 3, "of": 9, "without_gradient": 0, "model": "m", "adapter": None}
    found = {"group_influence": {"targets": {"gsm8k": effect}, "about": about}}
    (folder / "evaluation.json").write_text(json.dumps(found))
    html, page = build(folder)
    section = html[html.index('<section id="evaluation">') :].partition("</section>")[0]
    assert section.count("<svg") == 1, "the evaluation's figure is not on the page, or twice"
    assert section.index("</table>") < section.index("<svg"), "figures come before the numbers"
    assert alt in page.text["evaluation"], "a caption was taken for markup, or is not there"
    assert "var(--chosen)" in section, (
        "the figure does not follow the page's light and dark colours"
    )
