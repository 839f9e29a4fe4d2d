"""The report of a run directory, finished or not: what its page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from influence import plots, storage
from influence.coverage_figures import coverage_report
from influence.layer_figures import layer_report
from influence.methods import METHODS
from influence.records import FailedShard, StageRecord, TargetFidelity
from influence.report_bill import bill_caption, bill_lines
from influence.report_data import (
    RunData,
    ScoreColumns,
    SourceRow,
    effective_numbers,
    optional_bytes,
    read_run,
    source_table,
)
from influence.report_format import decimal, step_phrase
from influence.report_objective import objective_report
from influence.report_page import render_page, write_page

TOP_SOURCES = 30


@dataclass(frozen=True)
class CertificateRow:
    """One line of the certificate; `group` says that it is a group of the target above it."""

    name: str
    group: bool
    fidelity: TargetFidelity


@dataclass(frozen=True)
class StageRow:
    """One stage: `model_share` of the replicas' time (0 to 1), `rate` in tokens per second."""

    name: str
    record: StageRecord
    model_share: float | None
    rate: float | None


@dataclass(frozen=True)
class TargetFigures:
    """The figures of one target, and the length correlation that belongs to one of them."""

    name: str
    histogram: plots.Plot | None
    length: plots.Plot | None
    length_spearman: float | None
    recorded: bool


@dataclass(frozen=True)
class WeightSummary:
    """The selection's weights, scaled to mean 1: how many equal weights they amount to."""

    count: int
    kish: float
    entropy: float
    largest: float
    figure: plots.Plot | None


def build_report(run_url: str) -> str:
    """Write `report.html` into a run directory (local path, s3:// or gs://) and return its URL.

    Optional files that are not there yet are named on the page. A directory that only
    `influence evaluate` wrote into has a page of its evaluations. Building again replaces the page.

    Raises:
        InputError: neither manifest.json nor evaluation.json is in the directory, or a document
            there cannot be understood.

    Example:
        >>> influence.build_report(config.run)
        'runs/eight/report.html'
    """
    if storage.head(storage.join(run_url, "manifest.json")) is None:
        raw = optional_bytes(run_url, "evaluation.json")
        if raw is not None:
            # It brings the jobs' own modules along, torch among them.
            from influence.report_evaluation import render_evaluation

            return write_page(run_url, render_evaluation(run_url, raw))
    return write_page(run_url, render(read_run(run_url)))


def render(run: RunData) -> str:
    """The page of a run."""
    return render_page("report.html.j2", context(run))


def context(run: RunData) -> dict[str, Any]:
    """What the template shows, in its order."""
    counts, method = run.manifest.counts, METHODS.get(run.manifest.method)
    name = run.manifest.method if method is None else method.title
    sources, other = ([], None)
    if run.scores is not None:
        sources, other = source_table(
            run.scores.pool_sources, run.scores.chosen_sources, TOP_SOURCES
        )
    shown: list[SourceRow] = [*sources, *([other] if other else [])]
    return {
        "run": run,
        "manifest": run.manifest,
        "counts": counts,
        "method": name,
        "title": f"{name}: selection report",
        "model": (run.config.get("model") or {}).get("name"),
        "pool": (run.config.get("data") or {}).get("candidates"),
        "share": _ratio(counts.get("selected"), counts.get("scored")),
        "failed": failed_shards(run),
        "warnings": warnings(run),
        "certificate": certificate(run),
        "sketched": is_sketched(run),
        "sources": shown,
        "other": other,
        "widest": max((max(s.pool_share, s.chosen_share) for s in sources), default=1.0),
        "figures": target_figures(run),
        "landmarks": landmark_figures(run),
        "rounds": run.fidelity.rounds if run.fidelity is not None else [],
        "reliability": reliability_figure(run),
        "wanted_recall": (run.config.get("landmarks") or {}).get("recall"),
        "weights": weight_summary(run.scores) if run.scores else None,
        "objective": objective_report(run.fidelity.objective if run.fidelity else None),
        "length": counts.get("length_spearman") or {},
        "gradients": _gradient_settings(run),
        "optimizer": _optimizer(run),
        "layers": layer_report(run.manifest.layers),
        "embedding": run.manifest.embedding,
        "evaluations": evaluations(run),
        "covered": coverage_report(run.coverage),
        "stages": [stage_row(name, record) for name, record in run.manifest.stages.items()],
        "harmful": [s for s in run.samples.get("worst", []) if s["score"] < 0],
        "bill": run.manifest.bill,
        "bill_lines": bill_lines(run.manifest.bill) if run.manifest.bill else [],
        "bill_caption": bill_caption(run.manifest.bill) if run.manifest.bill else "",
        "attributed": sum(r["share"] for r in run.manifest.coverage if r["attributed"]),
    }


def evaluations(run: RunData) -> list[Any]:
    """(table, figures) of everything that `influence evaluate` measured."""
    if run.evaluation is None:
        return []
    from influence.report_evaluation import shown_evaluations  # as in build_report

    return shown_evaluations(run.url, run.evaluation)


def failed_shards(run: RunData) -> list[tuple[str, FailedShard]]:
    """(stage, shard) of every shard that failed for good."""
    return [(name, shard) for name, r in run.manifest.stages.items() for shard in r.failed]


def warnings(run: RunData) -> list[str]:
    """What a reader should know before any number: disagreements between the run's own files."""
    found = []
    counts = run.manifest.counts
    if counts.get("budget_exceeds_pool"):
        found.append(
            f"The budget ({counts.get('budget')}) is larger than the pool: every row that could be "
            "scored is selected, so the ranking decides nothing."
        )
    if counts.get("short_of_proponents"):
        found.append(
            f"The budget ({counts.get('budget')}) is larger than the proponents: all "
            f"{counts.get('proponents'):,} rows with a score above 0 are selected, and no other."
        )
    if run.scores is None:
        return found
    for name, counted in (
        ("rows", len(run.scores.weight)),
        ("scored", int(np.isfinite(run.scores.score).sum())),
        ("selected", int((run.scores.weight > 0).sum())),
    ):
        recorded = counts.get(name)
        if recorded is not None and recorded != counted:
            found.append(
                f"manifest.json counts {recorded:,} {name}, the score files hold {counted:,}: "
                "the files are of different runs or incomplete. Run the same command again."
            )
    return found


def certificate(run: RunData) -> list[CertificateRow]:
    """The certificate's lines, every target followed by its groups."""
    if run.fidelity is None:
        return []
    targets = run.fidelity.targets

    def place(name: str) -> tuple[int, str]:
        owner = name.split("/", 1)[0]
        first = next(i for i, other in enumerate(targets) if other.split("/", 1)[0] == owner)
        return first, name

    return [
        CertificateRow(name, "/" in name and name.split("/", 1)[0] in targets, targets[name])
        for name in sorted(targets, key=place)
    ]


def is_sketched(run: RunData) -> bool:
    """Whether scores from a row's own gradient still carry the noise of a sketch."""
    targets = run.fidelity.targets.values() if run.fidelity is not None else ()
    return any(t.landmark_halfwidth > 0 or (t.sketch_sd or 0) > 0 for t in targets)


def target_figures(run: RunData) -> list[TargetFigures]:
    """Score distribution and score against length, for every drawn target or the plain score."""
    if run.scores is None:
        return []
    scores = run.scores
    correlations = run.manifest.counts.get("length_spearman") or {}
    columns = scores.by_name or {"score": scores.score}
    made = []
    for name, column in columns.items():
        there = np.isfinite(column)
        values, picked = column[there], column[there & (scores.weight > 0)]
        rho = correlations.get(name)
        made.append(
            TargetFigures(
                name,
                plots.score_histogram(
                    values,
                    picked,
                    f"Histogram of the scores for {name}: {len(values):,} rows, of which "
                    f"{len(picked):,} are selected.",
                ),
                plots.score_by_length(
                    scores.response_tokens[there],
                    values,
                    f"Scores for {name} against response tokens; Spearman {decimal(rho)}.",
                ),
                rho,
                name in correlations,
            )
        )
    return made


def landmark_figures(run: RunData) -> list[tuple[str, int, plots.Plot | None]]:
    """(name, landmarks, figure) of every drawn name with landmarks."""
    drawn = run.scores.drawn if run.scores is not None else tuple(run.landmarks)
    figures = []
    for name in drawn:
        if name not in run.landmarks:
            continue
        both = run.landmarks[name]
        count = len(both.exact)
        alt = f"Predicted against exact scores of {count:,} held-out landmarks for {name}."
        figures.append(
            (name, count, plots.predicted_against_exact(both.predicted, both.exact, alt))
        )
    return figures


def reliability_figure(run: RunData) -> plots.Plot | None:
    """Predicted probability of membership against what came out; None without rounds."""
    bins = run.fidelity.reliability if run.fidelity is not None else []
    rows = sum(each.rows for each in bins)
    alt = f"Predicted against observed frequency of members among {rows:,} rows acquired later."
    return plots.reliability(
        np.array([each.predicted for each in bins]),
        np.array([each.observed for each in bins]),
        np.array([each.rows for each in bins]),
        alt,
    )


def weight_summary(scores: ScoreColumns) -> WeightSummary | None:
    """The weights in use; None where nothing is selected."""
    weights = scores.weight[scores.weight > 0]
    if not len(weights):
        return None
    kish, entropy = effective_numbers(weights)
    return WeightSummary(
        len(weights),
        kish,
        entropy,
        float(weights.max() / weights.mean()),
        plots.weight_histogram(
            weights, f"Histogram of the {len(weights):,} selected rows' weights."
        ),
    )


def _gradient_settings(run: RunData) -> dict[str, Any] | None:
    """How token gradients became a row's, for methods whose scores come from gradients."""
    method = METHODS.get(run.manifest.method)
    if method is None or not method.needs_gradients:
        return None
    return run.config.get("gradients")


def _optimizer(run: RunData) -> str:
    """Whose step the scores are about; nothing for plain gradient descent."""
    section = run.config.get("optimizer") or {}
    return step_phrase(section.get("kind"), section.get("state"))


def stage_row(name: str, record: StageRecord) -> StageRow:
    """Shares and rates of a stage; None where no time was spent (all shards reused)."""
    return StageRow(
        name,
        record,
        record.model_share,
        _ratio(record.tokens or None, record.seconds) if record.computed else None,
    )


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
