"""Is the certificate true? Scores of an approximate run against those of an exact one.

    python benchmarks/true_fidelity.py RUN EXACT_RUN [--share 5%] [--json FILE]

Both runs must score the same pool against the same targets. The certificate's Spearman is about
the rows that are no landmarks, its recall about all rows (landmarks keep their exact scores), at
the run's own budget; the 90 % interval of a score is checked on the rows that are no landmarks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import read_scores, write_json
from jaxtyping import Bool, Float

from influence import storage
from influence.errors import InfluenceError, InputError
from influence.fidelity import true_fidelity

PREFIX = "score."


def compare(run: str, exact_run: str, share: float | None = None) -> dict[str, Any]:
    """Truth and claim for every score column that both runs have.

    `share` of the scored rows is the top that a recall is about; by default the run's selection.
    """
    approximate, truth = read_scores(run), read_scores(exact_run)
    if approximate.column("id").to_pylist() != truth.column("id").to_pylist():
        raise InputError(f"{run} and {exact_run}: other ids; expected two runs over one pool")
    names = [
        name.removeprefix(PREFIX)
        for name in approximate.column_names
        if name.startswith(PREFIX) and name in truth.column_names
    ]
    if not names:
        raise InputError(f"{run} and {exact_run}: no target in common")
    in_one, in_other = floats(approximate, "score"), floats(truth, "score")
    scored = np.isfinite(in_one) & np.isfinite(in_other)
    selected = floats(approximate, "weight") > 0
    wanted = floats(truth, "weight") > 0
    if share is None:
        share = float(selected.sum() / np.isfinite(in_one).sum())
    landmarks = approximate.column("exact").to_numpy().astype(bool)
    claims = json.loads(storage.read_bytes(storage.join(run, "fidelity.json")))
    return {
        "run": run,
        "exact_run": exact_run,
        "share": share,
        "rows": int(scored.sum()),
        "scored_in_one_only": int((np.isfinite(in_one) ^ np.isfinite(in_other)).sum()),
        "landmarks": int((landmarks & scored).sum()),
        "selection": {
            "rows": int(selected.sum()),
            "in_common": int((selected & wanted).sum()),
            "recall": float((selected & wanted).sum() / max(1, wanted.sum())),
            "claimed": claims.get("recall", {}),
        },
        "targets": {
            name: compare_target(
                approximate, truth, name, scored, landmarks, claims["targets"][name], share
            )
            for name in names
        },
    }


def compare_target(
    approximate: pa.Table,
    truth: pa.Table,
    name: str,
    scored: Bool[np.ndarray, " n"],
    landmarks: Bool[np.ndarray, " n"],
    claim: dict[str, Any],
    share: float,
) -> dict[str, Any]:
    """One column: Spearman and recall over all and over non-landmark rows, interval coverage."""
    values, actual = floats(approximate, PREFIX + name), floats(truth, PREFIX + name)
    low, high = floats(approximate, f"low.{name}"), floats(approximate, f"high.{name}")
    covered = (low <= actual) & (actual <= high)
    rest, own = scored & ~landmarks, scored & landmarks
    everything, others = (
        ranking(values, actual, scored, share),
        ranking(values, actual, rest, share),
    )
    claimed_width = claim.get("score_halfwidth") is not None
    return {
        "spearman": everything[0],
        "recall": everything[1],
        "spearman_rest": others[0],
        "recall_rest": others[1],
        "claimed_spearman": claim["spearman"],
        "claimed_recall": claim["recall"],
        "spearman_inside": inside(others[0], claim["spearman"]),
        "recall_inside": inside(everything[1], claim["recall"]),
        "coverage_rest": float(covered[rest].mean()) if claimed_width and rest.any() else None,
        "coverage_landmarks": float(covered[own].mean()) if claimed_width and own.any() else None,
        # Without a claim of a sketch the two runs' scores need not be on one scale (RDS+).
        "error_sd_landmarks": error_sd(values, actual, own) if claim.get("sketch_sd") else None,
        "claimed_sketch_sd": claim.get("sketch_sd"),
    }


def floats(table: pa.Table, name: str) -> Float[np.ndarray, " n"]:
    """A column as float64, nulls as NaN."""
    return table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)


def ranking(
    values: Float[np.ndarray, " n"],
    actual: Float[np.ndarray, " n"],
    rows: Bool[np.ndarray, " n"],
    share: float,
) -> tuple[float | None, float | None]:
    """(Spearman, recall of the top `share`) over some rows; (None, None) over fewer than two."""
    count = int(rows.sum())
    if count < 2:
        return None, None
    found = true_fidelity(values[rows], actual[rows], max(1, round(share * count)))
    return found.spearman, found.recall


def inside(value: float | None, claim: dict[str, Any]) -> bool | None:
    """Whether the true value is in the claimed interval; None without either."""
    if value is None or claim.get("low") is None or claim.get("high") is None:
        return None
    return bool(claim["low"] <= value <= claim["high"])


def error_sd(
    values: Float[np.ndarray, " n"], actual: Float[np.ndarray, " n"], rows: Bool[np.ndarray, " n"]
) -> float | None:
    """Root mean square error of the landmarks' own scores: the sketch's noise."""
    if not rows.any():
        return None
    return float(np.sqrt(np.mean((values[rows] - actual[rows]) ** 2)))


def markdown(found: dict[str, Any]) -> str:
    """The comparison as a table; `in` and `OUT`: is the truth in the claimed interval."""
    selection = found["selection"]
    lines = [
        f"{found['run']} against {found['exact_run']}: {found['rows']} rows, "
        f"{found['landmarks']} of them exact; top {found['share']:.1%}. The selections share "
        f"{selection['in_common']} of {selection['rows']} rows (recall {selection['recall']:.3f}; "
        f"claimed {interval(selection['claimed'], 'expected')}).",
        "",
        "| target | Spearman, all | recall, all | claimed recall | | Spearman, no landmarks "
        "| claimed Spearman | | recall, no landmarks | 90 % intervals, no landmarks "
        "| 90 % intervals, landmarks | landmark error sd | claimed |",
        "|---|---:|---:|---:|---|---:|---:|---|" + "---:|" * 5,
    ]
    for name, row in found["targets"].items():
        cells = [
            name,
            number(row["spearman"]),
            number(row["recall"]),
            interval(row["claimed_recall"], "expected"),
            {True: "in", False: "OUT", None: ""}[row["recall_inside"]],
            number(row["spearman_rest"]),
            interval(row["claimed_spearman"], "value"),
            {True: "in", False: "OUT", None: ""}[row["spearman_inside"]],
            number(row["recall_rest"]),
            number(row["coverage_rest"]),
            number(row["coverage_landmarks"]),
            number(row["error_sd_landmarks"], 4),
            number(row["claimed_sketch_sd"], 4),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(claim: dict[str, Any], key: str) -> str:
    """A claimed value with its interval."""
    if claim.get(key) is None:
        return "-"
    return f"{claim[key]:.3f} ({number(claim.get('low'))} to {number(claim.get('high'))})"


def share_of(text: str) -> float:
    """`5%` or `0.05` -> 0.05."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share in (0, 1], such as 5%")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, and write the JSON if asked to; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("exact_run")
    parser.add_argument("--share", type=share_of, help="top share; default: the run's selection")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    try:
        found = compare(arguments.run, arguments.exact_run, arguments.share)
    except InfluenceError as error:
        print(f"error: {error}")
        return error.exit_code
    if arguments.json:
        write_json(Path(arguments.json), found)
    print(markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
