"""The worked plan of docs/scaling.md: what the cost model and the measurements say today."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

BEGIN, END = "<!-- python -m benchmarks.scaling -->\n", "<!-- end -->"


def test_the_page_holds_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    held = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert held == scaling.report(scaling.parse([])), (
        "the cost model or a measurement has changed: put the output of "
        "`python -m benchmarks.scaling` into docs/scaling.md, and read the page again"
    )


def test_bytes_of_rows_are_those_of_the_shards() -> None:
    # What the formulas say of the measured width, beside what serialised shards took.
    worked = scaling.Worked(scaling.parse([]), 1_000_000)
    per_row = worked.bytes_per_row()
    measured = worked.verifying["bytes_per_row_stored"], worked.round["score_bytes_per_row"]
    for name, stored in zip(("embedding", "scores of one round"), measured, strict=True):
        assert abs(per_row[name] / stored - 1) < 0.02, f"{name}: {per_row[name]} against {stored}"


def test_rows_and_prices_scale_the_bill_as_they_should() -> None:
    def together(*options: str) -> list[float]:
        worked = scaling.Worked(scaling.parse(options), 4_000_000)
        steps = [worked.steps(method) for method in ("uniform", "certified", "exact")]
        return [sum(step.gpu_seconds for step in each) for each in steps]

    base, wide = together("--replicas", "64"), together("--replicas", "8")
    assert base == wide, "the GPUs' work depends on how many there are"
    uniform, certified, exact = base
    assert uniform < certified < exact
