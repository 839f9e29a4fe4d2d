"""The tables that a run prints when it is done."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from influence.bill_tables import bill_table
from influence.contamination_record import Contamination
from influence.errors import InputError
from influence.records import Fidelity, Interval, Manifest, Recall
from influence.report_format import percent
from influence.run_log import read_manifest
from influence.status import compact_table, damage_text, share_text

MOST_SOURCES = 30


def summary_tables(run: str, summary: dict[str, Any]) -> list[Table]:
    """Sources, certificate, stages, the bill. Names out of the data stand as they are."""
    manifest = read_manifest(run)
    if manifest is None:
        raise InputError(f"{run}: no manifest.json; expected a run directory")
    tables = [
        source_table(summary["sources"]),
        certificate_table(Fidelity.model_validate(summary["fidelity"])),
        stage_table(manifest),
    ]
    if manifest.bill is not None:
        tables.append(bill_table(manifest.bill))
    return tables


def proponents_line(counts: dict[str, Any]) -> str | None:
    """How many rows help and how many harm, of a method whose scores have a sign; else None."""
    if counts.get("proponents") is None:
        return None
    text = (
        f"proponents (score above 0): {counts['proponents']:,} of {counts['scored']:,}; opponents, "
        f"likely harmful rows: {counts['opponents']:,}"
    )
    if counts["short_of_proponents"]:
        text += (
            f"\nThe budget ({counts['budget']}) is larger than the proponents: all of them are "
            "selected, and no other row."
        )
    return text


def contamination_line(counts: dict[str, Any]) -> str | None:
    """How many candidates are target rows, or nearly; None where that was not looked for."""
    if counts.get("contamination") is None:
        return None
    record = Contamination.model_validate(counts["contamination"])
    kinds = ", ".join(f"{found.rows:,} {kind}" for kind, found in record.kinds.items())
    text = f"contamination: {record.all.rows:,} candidates are target rows or nearly ({kinds}); "
    selected = f"{record.all.selected or 0:,} of them are selected"
    if record.action == "drop":
        return text + "all of them were dropped"
    if record.action == "flag" and record.all.selected:
        return f"{text}{selected}: contamination.action: drop leaves them out"
    return text + selected


def objective_line(fidelity: dict[str, Any]) -> str | None:
    """What one step on the weighted selection is expected to do; None in first order."""
    account = Fidelity.model_validate(fidelity).objective
    if account is None:
        return None
    text = (
        f"second order ({account.curvature}, eta {account.eta:g}): one step is expected to change "
        f"the target loss by {account.predicted_second:.3g} nats, {account.predicted_first:.3g} by "
        f"the gradient alone; {account.support:,} rows have weight"
    )
    return text if account.note is None else f"{text}; {account.note}"


def source_table(sources: dict[str, tuple[int, int]]) -> Table:
    """Share of each source in the pool and in the selection, most selected first."""
    table = Table(title="pool and selection by source")
    for heading in ("source", "pool", "share", "selected", "share", "enrichment"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    pool = sum(before for before, _ in sources.values())
    chosen = max(1, sum(after for _, after in sources.values()))
    rows = [
        (name, before, before / pool, after, after / chosen)
        for name, (before, after) in sources.items()
    ]
    # By what was selected: among hundreds of sources the most enriched ones hold a row or two.
    rows.sort(key=lambda row: (-row[3], -row[4] / row[2], row[0]))
    for name, before, share, after, part in rows[:MOST_SOURCES]:
        table.add_row(
            Text(name),
            str(before),
            f"{share:.1%}",
            str(after),
            f"{part:.1%}",
            f"{part / share:.2f}",
        )
    if len(rows) > MOST_SOURCES:
        rest = rows[MOST_SOURCES:]
        table.add_row(
            f"... {len(rest)} more",
            str(sum(row[1] for row in rest)),
            f"{sum(row[2] for row in rest):.1%}",
            str(sum(row[3] for row in rest)),
            f"{sum(row[4] for row in rest):.1%}",
            "",
        )
    return table


def certificate_table(fidelity: Fidelity) -> Table:
    """How well the predicted scores stand for exact ones, per target and group."""
    if fidelity.exact:
        table = Table(title="certificate: no score is approximated by a regression")
        table.add_column("target")
        table.add_column("sd of the sketch's noise", justify="right")
        for name, target in fidelity.targets.items():
            noise = "none" if target.sketch_sd is None else f"{target.sketch_sd:.4f}"
            table.add_row(Text(name), noise)
        return table
    audited = fidelity.recall.audit_low is not None
    headings = ["target", "Spearman", "R^2", "recall of the top share", "90 % score ±"]
    headings += ["audited recall, at least"] if audited else []
    table = Table(title=_certificate_title(fidelity))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "target" else "right")
    for name, target in fidelity.targets.items():
        table.add_row(
            Text(name),
            _interval(target.spearman),
            _number(target.r2),
            _recall(target.recall),
            _number(target.score_halfwidth, 4),
            *([_number(target.recall.audit_low)] if audited else []),
        )
    whole = fidelity.recall
    last = ["selection", "", "", _recall(whole), ""]
    table.add_row(*last, *([_number(whole.audit_low)] if audited else []))
    if fidelity.estimated:
        table.caption = (
            f"{fidelity.estimated} of the selected rows have a predicted score: landmarks.count "
            "was spent; raise it to make them exact"
        )
    return table


def _certificate_title(fidelity: Fidelity) -> str:
    if not fidelity.rounds:
        return f"certificate ({fidelity.landmarks} landmarks; leave-one-out, 95 % intervals)"
    return (
        f"certificate ({fidelity.landmarks} exact rows in {len(fidelity.rounds)} rounds; 95 % "
        "intervals, 90 % for the recall)"
    )


def _recall(recall: Recall) -> str:
    return _interval(Interval(value=recall.expected, low=recall.low, high=recall.high))


def stage_table(manifest: Manifest) -> Table:
    """Seconds per stage and the models' share of the replicas' time."""
    caption = "\n".join(line for line in (share_text(manifest), damage_text(manifest)) if line)
    table = compact_table(title="stages", caption=caption or None)
    headings = ("stage", "shards", "reused", "rows", "tokens", "seconds", "tokens/s")
    for heading in (*headings, "in model"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, stage in manifest.stages.items():
        rate = f"{stage.tokens / stage.seconds:,.0f}" if stage.tokens and stage.seconds else ""
        table.add_row(
            Text(name),
            str(stage.shards or ""),
            str(stage.reused or ""),
            str(stage.rows or ""),
            f"{stage.tokens:,}" if stage.tokens else "",
            f"{stage.seconds:.1f}",
            rate,
            "" if stage.model_share is None else percent(stage.model_share),
        )
    return table


def _interval(value: Interval) -> str:
    if value.value is None:
        return "undefined"
    return f"{value.value:.3f} [{_number(value.low)}, {_number(value.high)}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
