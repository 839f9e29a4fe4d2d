"""The evaluation `fidelity` as it is shown: a table, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from influence.evaluations.fidelity_document import Fidelity, Figure, SettingFigures, Stated
from influence.evaluations.kind import ResultTable
from influence.report_format import amount, decimal, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from influence.plots import Plot


def table(document: dict[str, Any]) -> ResultTable:
    """A line for every setting, by the mean score of the targets; then the certified rounds."""
    found = Fidelity.model_validate(document)
    about = found.about
    rows = [
        (_name(each, found.settings[0]), amount(each.flops), *_cells(each, about.names[-1]))
        for each in found.settings
    ]
    for name in about.names[:-1]:
        own = found.settings[0]
        rows.append((f"own settings, {name}", amount(own.flops), *_cells(own, name)))
    for each in found.certified:
        exact = about.gradient_flops * each.exact_share
        flops = next(e.flops for e in found.embeddings if e.label == each.embedding)
        low = decimal(each.low.mean)
        rows.append(
            (
                f"certified for {each.asked:g}: {each.embedding}",
                amount(flops + exact),
                "",
                "",
                decimal(each.recall.mean),
                f"{decimal(each.stated.mean)} (from {low})",
                percent(each.above_low, 0),
                f"{amount(each.exact.mean or 0.0)} exact",
            )
        )
    headings = (
        "Setting",
        "FLOP a candidate",
        "Spearman",
        "Spearman, stated",
        "Recall",
        "Recall, stated",
        "Stated held",
        "Recall, best 5%",
    )
    return ResultTable("Fidelity of predicted scores", _caption(found), headings, rows)


def _caption(found: Fidelity) -> str:
    about = found.about
    text = (
        f"Predicted scores of {about.pilot:,} random candidates against their exact ones (of "
        f"{about.projection} gradients), by the mean score of the targets, in the mean over "
        f"{about.repeats} draws of landmarks; the recall is that of the best "
        f"{percent(about.share)} of the {about.pool:,} candidates, the budget's part, with so many "
        "landmarks among all of them. Stated: by the certificate, from the "
        "landmarks alone, with the mean limits of its intervals; held: how often both truths lay "
        "in them. The first line has the config's own settings, the others of the star what is "
        "named instead. Certified: true recall of the selection, what was stated with the lower "
        "limit, how often the truth was not below that, and the exact scores that it took (of "
        "other embeddings than the config's one draw); their "
        "operations are for the same part of the pool as of these rows."
    )
    if about.left_out:
        counts = ", ".join(f"{count:,}" for count in about.left_out)
        text += f" Left out, as the rows are too few: {counts} landmarks."
    return text


def _name(each: SettingFigures, own: SettingFigures) -> str:
    """What is other than in the config's own setting; that one in full."""
    parts = {
        "embedding": each.embedding,
        "landmarks": f"{each.landmarks:,} landmarks",
        "kernel": each.kernel,
        "damping": f"damping {each.damping:g}",
    }
    if each is own:
        return "; ".join(parts.values())
    return "; ".join(text for key, text in parts.items() if getattr(each, key) != getattr(own, key))


def _cells(each: SettingFigures, name: str) -> tuple[str, ...]:
    figures = each.names[name]
    held = [s.inside for s in (figures.stated_spearman, figures.stated_recall)]
    there = [value for value in held if value is not None]
    return (
        _spread(figures.spearman),
        _stated(figures.stated_spearman),
        _spread(figures.recall),
        _stated(figures.stated_recall),
        percent(sum(there) / len(there), 0) if there else "",
        decimal(figures.recall_5.mean),
    )


def _spread(value: Figure) -> str:
    return decimal(value.mean)


def _stated(value: Stated) -> str:
    if value.value is None:
        return decimal(None)
    return f"{decimal(value.value)} ({decimal(value.low)} to {decimal(value.high)})"


def plots(document: dict[str, Any]) -> Sequence[Plot]:
    """Recall and Spearman against operations, and what is stated against the truth."""
    from influence.plots import drawn

    found = Fidelity.model_validate(document)
    name = found.about.names[-1]
    return [
        drawn(
            lambda axes: _against_cost(axes, found, name, "recall"),
            "Recall of the budget's best rows (up) against the operations of a candidate, its part "
            "of the landmarks' gradients included. Dots: single regressions, the largest one with "
            "the config's own settings; crosses: certified rounds.",
        ),
        drawn(
            lambda axes: _against_cost(axes, found, name, "spearman"),
            "Spearman of predicted and exact scores over rows that are no landmarks (up) against "
            "the same operations.",
        ),
        drawn(
            lambda axes: _honest(axes, found),
            "What the certificate states (across, with the mean limits of its intervals) against "
            "the truth (up): Spearman (dots) and recall (crosses) of every setting and name. On "
            "the line they agree.",
        ),
    ]


def _against_cost(axes: Axes, found: Fidelity, name: str, what: str) -> None:
    from influence.plots import CHOSEN, POOL

    for place, each in enumerate(found.settings):
        value = getattr(each.names[name], what)
        if value.mean is None:
            continue
        color, size = (CHOSEN, 34) if place == 0 else (POOL, 12)
        axes.vlines(each.flops, value.least, value.most, color=color, linewidth=0.6)
        axes.scatter([each.flops], [value.mean], s=size, color=color, zorder=3)
    if what == "recall":
        of = {each.label: each.flops for each in found.embeddings}
        for each in found.certified:
            flops = of[each.embedding] + found.about.gradient_flops * each.exact_share
            axes.scatter([flops], [each.recall.mean or 0.0], s=20, color=CHOSEN, marker="x")
    axes.set_xscale("log")
    axes.set_xlabel("operations of a candidate")
    axes.set_ylabel("recall" if what == "recall" else "Spearman")


def _honest(axes: Axes, found: Fidelity) -> None:
    from influence.plots import CHOSEN, INK, POOL

    least = 1.0
    for each in found.settings:
        for figures in each.names.values():
            for truth, claim, color, marker in (
                (figures.spearman, figures.stated_spearman, POOL, "o"),
                (figures.recall, figures.stated_recall, CHOSEN, "x"),
            ):
                if truth.mean is None or claim.value is None:
                    continue
                least = min(least, truth.mean, claim.value)
                axes.hlines(
                    truth.mean, claim.low or 0.0, claim.high or 0.0, color=color, linewidth=0.3
                )
                axes.scatter([claim.value], [truth.mean], s=10, color=color, marker=marker)
    axes.plot([least, 1.0], [least, 1.0], color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_xlabel("stated")
    axes.set_ylabel("true")
