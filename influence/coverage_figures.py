"""What the report shows of the coverage: the least covered columns, and how two measures agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from influence.records import Coverage, CoverageRow
from influence.sketch_noise import rank_correlation

LEAST = 20


@dataclass(frozen=True)
class CoverageReport:
    """`rows`: the columns with the least effective proponents first. `agreement`: Spearman of the
    effective number with the mean cosine over all columns."""

    coverage: Coverage
    rows: list[CoverageRow]
    median_effective: float
    uncovered: int
    agreement: float | None


def coverage_report(coverage: Coverage | None) -> CoverageReport | None:
    """The coverage as it is shown; None for a run without one."""
    if coverage is None or not coverage.rows:
        return None
    effective = np.array([row.effective for row in coverage.rows])
    cosines = np.array([row.nearest_mean for row in coverage.rows], dtype=np.float64)
    agreement = None
    if len(effective) > 3 and np.isfinite(cosines).all():
        found = rank_correlation(effective, cosines)
        agreement = found if np.isfinite(found) else None
    order = np.argsort(effective, kind="stable")[:LEAST]
    return CoverageReport(
        coverage,
        [coverage.rows[i] for i in order],
        float(np.median(effective)),
        int((effective == 0).sum()),
        agreement,
    )
