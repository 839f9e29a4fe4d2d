"""Every file of a run's result but the report, from its scores and its selection."""

from __future__ import annotations

from functools import partial
from typing import Any

from influence import outputs, storage
from influence.catalogue import Catalogue
from influence.certificate import named_scores
from influence.config import Config
from influence.contamination_reduce import Matches
from influence.lease import check_driver
from influence.outputs import COVERAGE
from influence.records import Coverage, Fidelity, to_json
from influence.score_table import rows_of
from influence.scores import Scores
from influence.selected import ScoreColumns, extremes, selected_counts, source_counts
from influence.selection import combined_score
from influence.table_selection import Selected
from influence.target_columns import TargetColumns


def write_results(
    config: Config,
    pool: Catalogue,
    scores: Scores,
    selected: Selected,
    fidelity: Fidelity,
    columns: TargetColumns,
    owner: str | None = None,
    coverage: Coverage | None = None,
    matches: Matches | None = None,
) -> dict[str, Any]:
    """Write scores, selection, samples, landmarks, coverage, contamination and certificate; returns
    counts for a summary.

    Raises:
        RunTakenError: the run is no longer that of the lease of this `owner`; the last thing
            before each file that is written is to look.
    """
    check = (lambda: None) if owner is None else partial(check_driver, config.run, owner)
    selection, combine, run = selected.selection, config.selection.combine, config.run
    columns_of = ScoreColumns.of(scores, selection, fidelity, columns, combine)
    beside = [] if matches is None else matches.selection_columns(selection.order)
    every = columns_of if matches is None else matches.beside(columns_of)
    flagged = matches is not None and matches.shown
    outputs.write_scores(run, pool, columns.names, scores.table, every, check, flagged=flagged)
    P = selected.scores(selection.order)
    score = combined_score(P, columns.target_of, combine)[0]
    outputs.write_selection(run, pool, selection, score, check, beside)
    best, worst = extremes(scores.table, columns, combine, outputs.SAMPLE_ROWS)
    samples = {"best": best, "worst": worst}
    of_samples = {k: columns_of(rows, rows_of(scores.table, rows).P) for k, rows in samples.items()}
    check()
    outputs.write_samples(run, pool, samples, of_samples)
    check()
    _write_landmarks(run, pool, scores, columns)
    check()
    _write_coverage(run, coverage)
    check()
    storage.put(storage.join(run, "fidelity.json"), to_json(fidelity))
    found: dict[str, Any] = {}
    if matches is not None:
        check()
        url = storage.join(run, outputs.CONTAMINATION)
        storage.put(url, matches.document(pool, selection.order))
        found = matches.counted(selection.order)
    counts = selected_counts(pool, selection, scores.table, columns, combine)
    return {
        "counts": {**counts, **found},
        "sources": source_counts(pool, selection),
        "fidelity": fidelity.model_dump(),
    }


def _write_coverage(run: str, coverage: Coverage | None) -> None:
    if coverage is not None:
        storage.put(storage.join(run, COVERAGE), to_json(coverage))


def _write_landmarks(run: str, pool: Catalogue, scores: Scores, columns: TargetColumns) -> None:
    url = storage.join(run, "landmarks.parquet")
    if scores.loo is None:
        if storage.head(url) is not None:
            storage.delete(url)  # of an earlier result of this run directory
        return
    exact, predicted = named_scores(scores, columns)
    ids = [str(pool.ids[position]) for position in scores.exact_positions]
    outputs.write_landmarks(run, ids, columns.names, exact, predicted)
