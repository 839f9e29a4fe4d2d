"""Rows spread evenly over a file of JSON lines: of a file that is ordered by task, of every task.

python benchmarks/evidence/spread.py FILE ROWS > OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def spread(lines: list[str], rows: int) -> list[str]:
    """`rows` of the lines, at equal distances; all where there are no more."""
    rows = min(rows, len(lines))
    return [lines[i * len(lines) // rows] for i in range(rows)]


def main() -> None:
    """Write the rows to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("rows", type=int)
    asked = parser.parse_args()
    lines = asked.file.read_text().splitlines(keepends=True)
    sys.stdout.writelines(spread(lines, asked.rows))


if __name__ == "__main__":
    main()
