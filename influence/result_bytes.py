"""How large a run's results will be: score parts, the selection, and the documents beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from influence import storage
from influence.budget import parse_budget
from influence.contamination_reduce import CHARACTERS, EXAMPLES
from influence.input_bytes import file_bytes
from influence.job import Job
from influence.methods import METHODS
from influence.outputs import (
    CONTAMINATION,
    COVERAGE,
    ROWS_PER_PART,
    SAMPLE_CHARACTERS,
    SAMPLE_ROWS,
    VALUES_PER_PART,
)

#: How often choosing and writing walk over the scores of a pool.
WALKS = 9
# Compressed lengths, flags, labels and a share of the ids; and what a part or a document takes.
_LABELS, _TEXT_SHARE, _PER_COLUMN, _DOCUMENTS = 12, 0.6, 130, 5_000
# Of a row as a line of JSON: bytes of a token, and of names and marks.
_PER_TOKEN, _MARKS = 4.2, 170
_NAMES = (
    "selection.jsonl",
    "fidelity.json",
    "landmarks.parquet",
    "samples.json",
    COVERAGE,
    CONTAMINATION,
)
# A column of the coverage as JSON.
_COVERAGE = 320
# Counts of contamination by kind and by target.
_MATCHES = 500


def selected_rows(budget: str | int | float, counts: Mapping[str, Any]) -> int:
    """Rows that will be selected: of a budget in tokens, as many as rows of mean length.

    A share of the proponents is counted as if all rows were proponents: the scores tell.
    """
    parsed, scored = parse_budget(budget), counts["scored"]
    if parsed.tokens is not None:
        mean = counts["tokens"] / max(1, counts["rows"])
        return min(scored, round(parsed.tokens / max(1.0, mean)))
    share = parsed.share or parsed.proponents or 0.0
    return min(scored, parsed.rows or max(1, round(share * scored)))


def of_results(
    job: Job, counts: Mapping[str, Any], landmarks: int, texts: float
) -> tuple[int, int]:
    """(bytes, objects) of a run's results but for the report; `texts` are bytes of a row's."""
    config, rows, scored = job.config, counts["rows"], counts["scored"]
    targets = counts["targets"]
    columns = sum(target["columns"] for target in targets.values())
    grouped = sum(t["columns"] for n, t in targets.items() if config.targets[n].group_by)
    names = len(targets) + grouped
    wide = columns + 3 * names + 8
    per_part = max(1, min(ROWS_PER_PART, VALUES_PER_PART // wide))
    parts = -(-rows // per_part)
    scores = scored * 8 * (2 + 3 * names) + round(rows * (_LABELS + _TEXT_SHARE * texts))
    selected = selected_rows(config.selection.budget, counts)
    parts_selected = max(1, -(-selected // ROWS_PER_PART))
    pool = sum(file_bytes(file) for file in job.files)
    stored = pool / max(1, sum(file.total_rows for file in job.files))
    line = _MARKS + _PER_TOKEN * counts["tokens"] / max(1, rows)
    samples = 2 * SAMPLE_ROWS * (100 + min(line, SAMPLE_CHARACTERS))
    selection = round((stored + line) * selected + samples)
    beside = landmarks * (16 * names + 16) + _DOCUMENTS
    footers = _PER_COLUMN * (parts * wide + parts_selected * 8)
    signed = METHODS[config.method].signed
    beside += _COVERAGE * columns if signed else 0
    if "contamination" in counts:
        shown = min(EXAMPLES, counts["contamination"]["all"]["rows"])
        beside += _MATCHES + shown * (_MARKS + 2 * round(min(line, CHARACTERS)))
    documents = 3 + (landmarks > 0) + signed + ("contamination" in counts)
    return scores + selection + beside + footers, parts + parts_selected + documents


def result_sizes(run: str) -> dict[str, int]:
    """Bytes of the result files that are in a run directory, by URL; not of the report."""
    found = {}
    for folder in ("scores", "selection"):
        found |= {info.url: info.size for info in storage.list_objects(storage.join(run, folder))}
    for name in _NAMES:
        info = storage.head(storage.join(run, name))
        if info is not None:
            found[info.url] = info.size
    return found
