"""The report's figures: inline SVG in the page's own colours and font.

No text of the pool is ever drawn: names go into the page's HTML, where they are escaped. Axes are
vector graphics; clouds of points and densities are a small picture inside, so that the size of a
figure does not grow with the number of rows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import textalloc
from jaxtyping import Float, Int
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from influence.intervals import wilson_interval

#: Above this number of points a figure shows a density instead.
MAX_POINTS = 2000
BINS = 60

# Stand-ins that the page's style sheet gives a value to, for a light and a dark page.
_INK, _POOL, _CHOSEN = "#010203", "#010204", "#010205"
_THEME = {_INK: "currentColor", _POOL: "var(--pool)", _CHOSEN: "var(--chosen)"}
#: The same for who draws with `drawn`: lines and text, what is compared with, what it is about.
INK, POOL, CHOSEN = _INK, _POOL, _CHOSEN
# Pictures cannot follow the style sheet: one blue that reads on both grounds.
_CLOUD = "#4586de"
_DENSITY = LinearSegmentedColormap.from_list("density", [f"{_CLOUD}38", f"{_CLOUD}ff"])

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "text.color": _INK,
}


@dataclass(frozen=True)
class Plot:
    """A figure for the page: `svg` is safe to insert as it is."""

    svg: Markup
    alt: str


def score_histogram(
    scores: Float[np.ndarray, "n"], chosen: Float[np.ndarray, "k"], alt: str
) -> Plot | None:
    """Counts of all scores and of the selected rows' scores in the same bins; None for no scores.

    The counts are on a logarithmic axis: a selection of 5 % could not be seen on a linear one.
    """
    if not len(scores):
        return None
    edges = _edges(scores)
    total, picked = np.histogram(scores, edges)[0], np.histogram(chosen, edges)[0]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        _steps(axes, total, edges, _POOL, floor=0.5)
        _steps(axes, picked, edges, _CHOSEN, floor=0.5)
        axes.set_yscale("log")
        axes.set_ylim(0.7, max(2.0, total.max() * 1.6))
        axes.yaxis.set_major_formatter(FuncFormatter(_count))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("score")
        axes.set_ylabel("rows")
        return _plot(figure, alt)


def predicted_against_exact(
    predicted: Float[np.ndarray, "l"], exact: Float[np.ndarray, "l"], alt: str
) -> Plot | None:
    """Leave-one-out predictions (across) against exact scores (up), with the line of equality."""
    if not len(exact):
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height=3.4)
        low, high = _padded(np.concatenate([predicted, exact]))
        axes.plot([low, high], [low, high], color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
        grid = np.linspace(low, high, BINS + 1)
        _cloud(axes, predicted, exact, grid, grid)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("predicted without its own gradient")
        axes.set_ylabel("exact score")
        return _plot(figure, alt)


def reliability(
    predicted: Float[np.ndarray, "b"],
    observed: Float[np.ndarray, "b"],
    rows: Int[np.ndarray, "b"],
    alt: str,
) -> Plot | None:
    """Observed frequency (up) of each bin of predicted probability, with a 95 % Wilson interval."""
    if not len(rows):
        return None
    limits = np.array([wilson_interval(o, n) for o, n in zip(observed, rows, strict=True)]).T.clip(
        0.0, 1.0
    )
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height=3.0)
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.vlines(predicted, limits[0], limits[1], color=_POOL, linewidth=1.2)
        axes.scatter(predicted, observed, s=18, color=_CHOSEN, zorder=3)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("part that were members")
        return _plot(figure, alt)


def score_by_length(
    tokens: Int[np.ndarray, "n"], scores: Float[np.ndarray, "n"], alt: str
) -> Plot | None:
    """Scores against response tokens (logarithmic), with the median score of each length bin."""
    if not len(scores):
        return None
    length = np.maximum(tokens, 1).astype(np.float64)
    low, high = np.log10(length.min()), np.log10(length.max())
    across = np.logspace(low - 0.02, max(high, low + 0.1) + 0.02, BINS + 1)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        axes.set_xscale("log")
        _cloud(axes, length, scores, across, _edges(scores))
        middle, median = _medians(length, scores, across[:: BINS // 12])
        axes.plot(middle, median, color=_CHOSEN, linewidth=1.6)
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.set_xlabel("response tokens")
        axes.set_ylabel("score")
        return _plot(figure, alt)


def layer_curves(
    curves: Mapping[str, tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]],
    budget: float,
    chosen: tuple[float, float],
    alt: str,
) -> Plot | None:
    """Spearman (up) of subsets of layers against their share of the bytes, a line for each rule.

    The dashed line is the budget, the point the subset that is used.
    """
    if not curves:
        return None
    styles = ["solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1))]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height=3.0)
        for place, (rule, (share, spearman)) in enumerate(curves.items()):
            color = _CHOSEN if rule == "greedy" else _POOL
            line = styles[place % len(styles)]
            axes.plot(share, spearman, color=color, linewidth=1.3, linestyle=line, label=rule)
        axes.axvline(budget, color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.scatter(*chosen, s=22, color=_CHOSEN, zorder=3)
        axes.set_xlim(0.0, min(1.0, 1.05 * budget))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.legend(frameon=False, handlelength=3.0)
        axes.set_xlabel("share of the bytes of all layers")
        axes.set_ylabel("Spearman with all layers")
        return _plot(figure, alt)


def budget_path(
    rows: Float[np.ndarray, "b"],
    effective: Float[np.ndarray, "b"],
    change: Float[np.ndarray, "b"],
    chosen: int,
    alt: str,
) -> Plot | None:
    """Effective rows, and the predicted change of the target loss, against the rows with weight.

    The dashed line is the run's own number of rows.
    """
    if len(rows) < 2:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height=3.0)
        axes.plot(rows, effective, color=_POOL, linewidth=1.3, marker="o", markersize=3)
        axes.axvline(chosen, color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rows with weight")
        axes.set_ylabel("effective rows")
        beside = axes.twinx()
        beside.plot(rows, change, color=_CHOSEN, linewidth=1.3, marker="o", markersize=3)
        beside.set_ylabel("predicted change of the target loss")
        beside.spines["right"].set_visible(True)
        return _plot(figure, alt)


def weight_histogram(weights: Float[np.ndarray, "k"], alt: str) -> Plot | None:
    """Counts of the selected rows' weights, scaled to a mean of 1."""
    if not len(weights):
        return None
    scaled = weights / weights.mean()
    edges = np.linspace(0.0, max(2.0, float(scaled.max()) * 1.001), 41)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        _steps(axes, np.histogram(scaled, edges)[0], edges, _CHOSEN, floor=0.0)
        axes.axvline(1.0, color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(_count))
        axes.set_xlabel("weight (mean 1)")
        axes.set_ylabel("selected rows")
        return _plot(figure, alt)


def drawn(draw: Callable[[Axes], object], alt: str, *, height: float = 3.0) -> Plot:
    """A figure that the caller draws, in the style of the others: 4.2 inches by `height`.

    `draw` gets the axes. Lines and points in INK, POOL or CHOSEN follow the page, light or dark; in
    other colours they stay as they are. `alt` says what there is to see, and is its caption; no
    text of the pool belongs into the figure, as it may be read as markup of mathematics ($).
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height)
        draw(axes)
        return _plot(figure, alt)


def name_points(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Names beside points of a figure that is complete but for them, so that none hides another."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # names are placed in the final layout
    x, y = [point[0] for point in points], [point[1] for point in points]
    textalloc.allocate(
        axes,
        x,
        y,
        list(names),
        x_scatter=x,
        y_scatter=y,
        textsize=7.5,
        textcolor=INK,
        linecolor=POOL,
        linewidth=0.5,
        max_distance=0.3,
        parse_math=False,
    )


def _figure(height: float = 2.7) -> tuple[Figure, Axes]:
    # A Figure of its own, not pyplot: nothing global, nothing to close.
    figure = Figure(figsize=(4.2, height), dpi=180, layout="constrained")
    return figure, figure.subplots()


def _edges(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "bins_plus_1"]:
    return np.linspace(*_padded(values), BINS + 1)


def _padded(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = (high - low) * 0.02 or max(abs(low) * 0.1, 1e-6)
    return low - pad, high + pad


def _steps(axes: Axes, counts: np.ndarray, edges: np.ndarray, color: str, floor: float) -> None:
    # A logarithmic axis has no 0: an empty bin is one below a single row.
    counts = np.maximum(counts, floor)
    axes.stairs(counts, edges, fill=True, color=color, linewidth=0, baseline=floor)


def _cloud(axes: Axes, x: np.ndarray, y: np.ndarray, across: np.ndarray, up: np.ndarray) -> None:
    """Points up to MAX_POINTS, a density on the grid beyond; a picture either way."""
    if len(x) <= MAX_POINTS:
        axes.scatter(x, y, s=7, color=_CLOUD, alpha=0.65, linewidths=0, rasterized=True)
        axes.set(xlim=(across[0], across[-1]), ylim=(up[0], up[-1]))
        return
    counts = np.histogram2d(x, y, bins=[across, up])[0].T
    shown = np.ma.masked_equal(counts, 0)
    top = max(2.0, float(counts.max()))
    axes.pcolormesh(across, up, shown, cmap=_DENSITY, norm=LogNorm(1, top), rasterized=True)


def _medians(
    x: np.ndarray, y: np.ndarray, edges: np.ndarray, fewest: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Geometric middle and median of y of each bin of x that holds `fewest` values at least."""
    place = np.digitize(x, edges)
    kept = [i for i in range(1, len(edges)) if np.count_nonzero(place == i) >= fewest]
    middle = [float(np.sqrt(edges[i - 1] * edges[i])) for i in kept]
    return np.asarray(middle), np.asarray([float(np.median(y[place == i])) for i in kept])


def _count(value: float, _position: object = None) -> str:
    return f"{value:,.0f}" if value >= 1 else ""


def _plot(figure: Figure, alt: str) -> Plot:
    """The figure as an <svg> element that inherits colour and font from the page."""
    buffer = io.StringIO()
    salt: dict[Any, Any] = {"svg.hashsalt": alt}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # The salt makes the ids of clip paths the same in every build, and different in every figure.
    with matplotlib.rc_context(salt):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    view = re.search(r'viewBox="([^"]*)"', text)
    if view is None:
        raise RuntimeError("matplotlib wrote an SVG without a viewBox")
    body = text[text.index(">", text.index("<svg")) + 1 :]
    # A style element or an id inside an inline SVG would belong to the whole page.
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<g|<image[^>]*?) id="[^"]*"', r"\1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = body.replace("xlink:href", "href")
    for stand_in, colour in _THEME.items():
        body = body.replace(stand_in, colour)
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{view.group(1)}">'
    return Plot(Markup(head + re.sub(r">\s+<", "><", body)), alt)
