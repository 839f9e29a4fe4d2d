"""The document of `evaluation.downstream` for people: a table, and loss against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from influence.config_downstream import FULL, UNTRAINED
from influence.evaluations.downstream_results import (
    Contrast,
    Downstream,
    Estimate,
    Result,
    TargetResult,
    both_ways,
)
from influence.evaluations.kind import ResultTable
from influence.report_format import DASH, amount, decimal, percent, short_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from influence.plots import Plot

ALL = "all targets"
LABELS = {FULL: "the whole pool", UNTRAINED: "not trained"}
LONGEST = 24


def table(document: dict[str, Any]) -> ResultTable:
    """A line for each target and selection; further tables hold every two of them side by side."""
    found = Downstream.model_validate(document)
    groups = _groups(found)
    answers = any(r.exact_match for each in groups.values() for r in each.results.values())
    headings = ["Trained on", "Test loss", "Perplexity"]
    headings += ["Exact match"] * answers
    headings += [f"Less {found.about.baseline}", "Seeds for s.e. = 1/5", "Of the full pool's gain"]
    headings += ["Rows", "Selecting: FLOP", "Selecting: time", "Training: FLOP", "Pareto front"]
    rows = []
    for target, each in groups.items():
        against = {c.of: c for c in each.contrasts if c.against == found.about.baseline}
        for name, result in each.results.items():
            cells = _cells(result, against.get(name), answers=answers)
            rows.append((f"{target}: {LABELS.get(name, name)}", *cells))
    pairs = [_pairs(target, each) for target, each in groups.items()]
    return ResultTable("Downstream", _caption(found), headings, rows, list(filter(None, pairs)))


def _pairs(target: str, found: TargetResult) -> ResultTable | None:
    """The loss of each row's selection less that of each column's; None for less than three."""
    less = both_ways(found.contrasts)
    names = [name for name in found.results if name != UNTRAINED]
    if len(names) < 3:
        return None

    def cell(row: str, column: str) -> str:
        pair = less.get((row, column))
        if pair is None:
            return DASH
        return decimal(pair.value, 3) + "*" * pair.sure

    return ResultTable(
        f"Downstream, {target}: each selection less each other one",
        "Test loss of the row's selection less that of the column's; below 0, the row's is better. "
        "*: 0 is not in the 95 % interval (intervals: evaluation.json).",
        ["Trained on", *(LABELS.get(name, name) for name in names)],
        [(LABELS.get(row, row), *(cell(row, column) for column in names)) for row in names],
    )


def plots(document: dict[str, Any]) -> Sequence[Plot]:
    """Loss against operations, a figure for each target and one for all of them."""
    from influence import plots as drawing

    found = Downstream.model_validate(document)
    figures = []
    for target, each in _groups(found).items():
        shown = {name: result for name, result in each.results.items() if name != UNTRAINED}
        if not all(result.flops > 0 for result in shown.values()):
            continue  # nothing was trained on: an axis of cost has no place for it
        front = [LABELS.get(name, name) for name, result in shown.items() if result.front]
        before = each.results[UNTRAINED].loss.mean
        alt = (
            f"{target}: test loss (with its standard error over seeds) against the operations of "
            f"selecting and one training. On the Pareto front: {', '.join(front)}. Not trained: "
            f"{decimal(before, 4)}."
        )
        figures.append(drawing.drawn(_pareto(shown), alt))
    return figures


def _pareto(shown: Mapping[str, Result]) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from influence.plots import CHOSEN, POOL, name_points

    def draw(axes: Axes) -> None:
        front = sorted((r.flops, r.loss.mean) for r in shown.values() if r.front)
        axes.step(*zip(*front, strict=True), where="post", color=CHOSEN, linewidth=1.0)
        for result in shown.values():
            color, place = CHOSEN if result.front else POOL, (result.flops, result.loss.mean)
            axes.errorbar(
                *place,
                yerr=result.loss.error or 0.0,
                color=color,
                marker="o",
                markersize=4,
                elinewidth=0.9,
            )
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("operations of selecting and training")
        axes.set_ylabel("test loss, nats per token")
        points = [(r.flops, r.loss.mean) for r in shown.values()]
        name_points(axes, points, [_short(LABELS.get(name, name)) for name in shown])

    return draw


def _short(name: str) -> str:
    """What fits beside a point: a long name would leave the axes no room."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _groups(found: Downstream) -> dict[str, TargetResult]:
    overall = {} if found.overall is None else {ALL: found.overall}
    return {**found.targets, **overall}


def _cells(result: Result, against: Contrast | None, *, answers: bool) -> list[str]:
    gain = DASH
    if result.gain is not None and result.gain.value is not None:
        gain = percent(result.gain.value, 0)
        if result.gain.low is not None:
            gain += f" [{percent(result.gain.low, 0)}, {percent(result.gain.high, 0)}]"
    chosen, trained = result.selection, result.training
    return [
        _estimate(result.loss),
        DASH if result.perplexity is None else _estimate(result.perplexity, 3),
        *([DASH if result.exact_match is None else _share(result.exact_match)] * answers),
        DASH if against is None else _difference(against),
        DASH if against is None else _seeds(against),
        gain,
        DASH if trained is None else f"{trained.rows:,.0f}",
        DASH if chosen is None else amount(chosen.flops),
        DASH if chosen is None else short_seconds(chosen.seconds),
        DASH if trained is None else amount(trained.flops),
        "yes" if result.front else "",
    ]


def _estimate(value: Estimate, digits: int = 4) -> str:
    error = "" if value.error is None else f"±{decimal(value.error, digits)}"
    return decimal(value.mean, digits) + error


def _share(value: Estimate) -> str:
    return percent(value.mean) + ("" if value.error is None else f"±{percent(value.error)}")


def _difference(pair: Contrast) -> str:
    if pair.low is None or pair.high is None:
        return decimal(pair.value, 4)
    return f"{decimal(pair.value, 4)} [{decimal(pair.low, 4)}, {decimal(pair.high, 4)}]"


def _seeds(pair: Contrast) -> str:
    return DASH if pair.seeds_needed is None else f"{max(1.0, pair.seeds_needed):,.0f}"


def _caption(found: Downstream) -> str:
    about = found.about
    tests = ", ".join(f"{name} {each.rows:,}" for name, each in found.targets.items())
    lines = [
        f"{about.model}, fine-tuned on each selection with {len(about.seeds)} seed(s)"
        f"{' and its weights' if about.weighted else ''}; test rows: {tests}. Test loss: mean over "
        "rows of a row's mean response loss in nats per token, ± its standard error over seeds. "
        "Differences, below 0 where the first one is better: 95 % interval, test rows resampled in "
        "pairs, seeds by Student's t."
    ]
    if len(about.seeds) == 1:
        lines.append("With one seed there is no interval.")
    for name, each in _groups(found).items():
        if each.without_loss:
            lines.append(f"{name}: {each.without_loss:,} test rows have no response, and no loss.")
        if each.answers is not None:
            why = "; other test rows have none to compare, or a prompt longer than max_length"
            others = why if each.answers < each.rows + each.without_loss else ""
            lines.append(f"{name}: exact match of {each.answers:,} answers{others}.")
        if each.judge is not None:
            apart = (
                "no selection stands out from that"
                if each.judge.selections is None
                else f"between selections {decimal(each.judge.selections, 4)}"
            )
            lines.append(
                f"Can the judge tell, {name}? Standard deviation between seeds "
                f"{decimal(each.judge.seeds, 4)}, {apart}."
            )
    lines.append(
        "Selecting: with an empty cache, without loading models; operations from the rows that it "
        "needs, time of one replica at the speed at which runs on this cache computed them."
    )
    assumed = sorted(
        f"{name} ({stage})"
        for each in found.targets.values()
        for name, result in each.results.items()
        if result.selection is not None
        for stage, part in result.selection.stages.items()
        if part.source.startswith("assumed")
    )
    if assumed:
        lines.append(f"Of speeds that nobody has measured: {', '.join(dict.fromkeys(assumed))}.")
    return " ".join(lines)
