"""What tokenising alone says of a run: rows, reasons, duplicates, truncation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from influence.catalogue import Catalogue
from influence.config import SelectionConfig
from influence.contamination_reduce import Matches
from influence.target_columns import TargetColumns


def pool_counts(
    pool: Catalogue,
    targets: Mapping[str, Catalogue],
    columns: TargetColumns,
    selection: SelectionConfig,
    matches: Matches | None = None,
) -> dict[str, Any]:
    """The counts of the pool and of every target, as the manifest holds them."""
    reasons = pool.reasons()
    per_target = Counter(column.target for column in columns.columns)
    return {
        "rows": len(pool),
        "scored": len(pool.eligible),
        "duplicates": reasons.get("duplicate", 0),
        "reasons": reasons,
        "truncated": int(pool.truncated.sum()),
        "tokens": int(pool.n_tokens.sum()),
        "response_tokens": int(pool.n_response_tokens.sum()),
        "budget": str(selection.budget),
        "combine": selection.combine,
        "targets": {
            name: {
                "rows": len(catalogue),
                "scored": len(catalogue.eligible),
                "columns": per_target[name],
                "truncated": int(catalogue.truncated.sum()),
                "reasons": catalogue.reasons(),
                "tokens": int(catalogue.n_tokens.sum()),
            }
            for name, catalogue in targets.items()
        },
        **({} if matches is None else matches.counted()),
    }
