"""The table of docs/faults.md out of the lines that the tests of faults write.

INFLUENCE_FAULTS_OUT=faults.jsonl python -m pytest -q tests/test_faults_*.py
python -m benchmarks.faults faults.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = ("fault", "runs", "kills", "computed again", "outcome", "seconds")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown; the lines of one fault are added up, a failure among them is its outcome."""
    faults: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        faults.setdefault(row["fault"], []).append(row)
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for fault, of in faults.items():
        sums = [str(sum(row[name] for row in of)) for name in ("runs", "kills", "recomputed")]
        outcomes = sorted({row["outcome"] for row in of}, key=lambda text: text != "FAILED")
        seconds = sorted(row["seconds"] for row in of)
        span = f"{seconds[0]:.0f}" + (f" to {seconds[-1]:.0f}" if len(of) > 1 else "")
        lines.append([fault, *sums, outcomes[0], span])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", type=Path, help="the file that INFLUENCE_FAULTS_OUT named")
    text = parser.parse_args().lines.read_text()
    print(table(json.loads(line) for line in text.splitlines()))


if __name__ == "__main__":
    main()
