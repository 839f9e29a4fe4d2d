"""What an evaluation puts into the report beside its table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from run_fixture import write_run
from test_report import build

from influence import plots
from influence.evaluation_tables import terminal_tables
from influence.evaluations import EVALUATIONS, ResultTable

pytestmark = pytest.mark.figures


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


def test_evaluations_without_a_selection_have_a_page_of_their_own(tmp_path: Path) -> None:
    hostile = "<b>t</b>"
    about = {"run": "r", "rows": 3, "of": 9, "without_gradient": 0, "model": "m", "adapter": None}
    effect = {"members": 1.0, "first": 2.0, "second": 3.0}
    found = {"group_influence": {"targets": {hostile: effect}, "about": about}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    page = build(tmp_path)[1]
    table = EVALUATIONS["group_influence"].table(found["group_influence"])
    assert page.tables["evaluation"][1:] == [list(row) for row in table.rows], (
        "the page's numbers are not those of the table on the terminal"
    )
    assert hostile in page.text["evaluation"], "a name was taken for markup"
    assert "evaluations/" in page.text["made"], "nothing says that the configs are missing"
    own = tmp_path / "evaluations" / "group_influence"
    own.mkdir(parents=True)
    unfinished = write_run(tmp_path / "other", state="interrupted")
    (own / "manifest.json").write_text((unfinished / "manifest.json").read_text())
    (own / "config.yaml").write_text("seed: 3  # of the evaluation")
    html, page = build(tmp_path)
    assert "seed: 3  # of the evaluation" in page.text["made"]
    assert "group_influence</strong> is interrupted" in html, "an attempt's end is not told"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_wide_table_is_whole_on_a_narrow_terminal(width: int) -> None:
    """In parts, each with the rows' names; no cell is cut."""
    headings = ["selection", *(f"number {j}" for j in range(12))]
    rows = [[f"method {i}", *(f"{i}.{j:02d} +- 0.01" for j in range(12))] for i in range(3)]
    result = ResultTable("worth", "what it is", headings, rows)
    console = Console(width=width, file=io.StringIO())
    tables = terminal_tables(result, width)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()
    lost = [cell for row in [headings, *rows] for cell in row if cell not in text]
    assert not lost, f"cut, or wrapped: {lost}"
    assert text.count("method 2") == len(tables)
    assert len(tables) > 1 or width == 200
    assert text.count("what it is") == 1


def test_a_long_name_takes_lines_and_not_the_room_of_the_numbers() -> None:
    name = "jvp, 4 blocks, 2 rank1 tangents; 256 landmarks; laplace kernel; damping 0.01"
    cells = ["0.68 (0.46 to 0.84)", "0.51 (0.31 to 0.70)"]
    console = Console(width=80, file=io.StringIO())
    for table in terminal_tables(ResultTable("t", "", ["setting", "a", "b"], [[name, *cells]]), 80):
        console.print(table)
    text = console.file.getvalue()
    assert all(cell in text for cell in cells), f"a number is cut or wrapped:\n{text}"
    assert all(word in text for word in name.split()), f"a part of the name is lost:\n{text}"
    assert "…" not in text


def test_names_of_crowded_points_hide_neither_each_other_nor_points() -> None:
    draw = np.random.default_rng(0)
    points = [(10.0**a, 1 + 0.02 * b) for a, b in draw.normal(size=(15, 2)) * 0.3]
    names = [f"a method {i}" for i in range(15)]
    boxes: list[Any] = []

    def crowded(axes: Any) -> None:
        axes.plot(*zip(*points, strict=True), "o", color=plots.POOL, markersize=4)
        axes.set_xscale("log")
        axes.margins(0.2)
        plots.name_points(axes, points, names)
        axes.figure.draw_without_rendering()
        assert sorted(text.get_text() for text in axes.texts) == sorted(names), "one is missing"
        boxes.extend(text.get_window_extent() for text in axes.texts)
        centres = axes.transData.transform(points)
        assert not any(box.contains(*centre) for box in boxes for centre in centres)

    first = plots.drawn(crowded, "names")
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), "a name lies on another one"
    assert plots.drawn(crowded, "names").svg == first.svg, "the same figure, drawn otherwise"
