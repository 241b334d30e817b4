"""Plots by matplotlib, as SVG elements inside a page, in the colours of its theme."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .page import lacking

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Point = tuple[float, float]
NamedPoint = tuple[float, float, str]

INK = "#1c2430"
SOFT = "#66707f"
EDGE = "#c9d0d8"
GRID = "#eef1f4"
CARD = "#ffffff"
BAD = "#c02626"
BAD_WASH = "#fdeaea"
COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#be185d",
    "#7c3aed",
    "#0891b2",
    "#65a30d",
    "#78350f",
    "#64748b",
    "#ea580c",
)
VARIABLES = {  # colour -> the variable of style.css that takes its place
    INK: "ink",
    SOFT: "soft",
    EDGE: "edge",
    GRID: "grid",
    CARD: "card",
    BAD: "bad",
    BAD_WASH: "bad-wash",
    **{colour: f"series-{index}" for index, colour in enumerate(COLOURS)},
}
MARKERS = "os^Dv"
DOTTED = (0, (2, 3))
SMALL = 8  # of letters, in points
SETTINGS: dict[Any, Any] = {  # by matplotlib's names
    "font.family": "sans-serif",
    "font.size": SMALL,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "weightport",  # the same bytes for the same figure
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True)
class Line:
    """One line of a plot; values that a logarithmic axis cannot show leave a gap."""

    title: str
    values: Sequence[float]


@dataclass(frozen=True)
class Series:
    """Points of one kind, (x, y, label) each.

    Attributes:
        hollow: they are not to be compared with the others.
    """

    title: str
    points: Sequence[NamedPoint]
    hollow: bool = False


def log_plot(
    lines: Sequence[Line],
    labels: Sequence[str],
    limit: float | None = None,
    marked: int | None = None,
) -> Markup:
    """Lines over named steps on a logarithmic axis.

    Args:
        labels: a name for each step; the first and the last are shown.
        limit: drawn across, such as a tolerance.
        marked: the step to point at.
    """
    with _axes(height=3) as (figure, axes):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        for line, colour in zip(lines, COLOURS, strict=False):
            values = [value if 0 < value < math.inf else math.nan for value in line.values]
            axes.plot(
                values, color=colour, label=line.title, linewidth=1.4, marker="o", markersize=2.6
            )
        if limit:
            _draw_limit(axes, limit, f"tolerance {limit:.0e}")
        if marked is not None:
            _point_at(axes, marked, labels[marked])
        low, high = axes.get_ylim()
        axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        axes.tick_params(axis="y", which="minor", left=False, labelleft=False)
        axes.set_xticks([0, len(labels) - 1], [labels[0], labels[-1]])
        first, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
        return _svg(figure)


def scatter_plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    front: Sequence[NamedPoint],
    limit: float | None,
) -> Markup:
    """Points on two logarithmic axes, those of a series joined by a thin line.

    Args:
        front: points to mark, name, and join by a staircase, in the order of x.
        limit: drawn across if it is near the points; below it y says nothing.
    """
    with _axes(height=4.4) as (figure, axes):
        lowest = math.inf
        looks = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
        for one, (colour, marker) in zip(series, looks, strict=False):
            shown = [(x, y) for x, y, _ in one.points if 0 < y < math.inf]
            lowest = min([lowest, *(y for _, y in shown)])
            axes.plot(
                *_columns(shown),
                color=colour,
                linewidth=0.5,
                marker=marker,
                markersize=5,
                markerfacecolor=CARD if one.hollow else colour,
                label=one.title,
            )
        marked = [point for point in front if point[1] > 0]
        axes.plot(
            *_columns([(x, y) for x, y, _ in marked]),
            color=INK,
            drawstyle="steps-post",
            linewidth=1.1,
            marker="o",
            markersize=11,
            markerfacecolor="none",
            label="Pareto front",
            gid="front",
        )
        if limit and limit > lowest / 10:
            _draw_limit(axes, limit, "reference's own error")
        axes.set(xscale="log", yscale="log")
        for axis, title in ((axes.xaxis, x_title), (axes.yaxis, y_title)):
            _write_plainly(axis)
            axis.set_label_text(title, color=SOFT)
        axes.margins(0.06)
        _name(axes, marked)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return _svg(figure)


def _draw_limit(axes: Axes, limit: float, label: str) -> None:
    axes.axhline(limit, color=BAD, linewidth=0.9, linestyle=DOTTED, label=label)


def _point_at(axes: Axes, step: int, label: str) -> None:
    """A band behind one step, with its name at the top."""
    axes.axvspan(step - 0.5, step + 0.5, color=BAD_WASH, zorder=0)
    axes.annotate(
        label,
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -11),
        textcoords="offset points",
        color=BAD,
    )


def _name(axes: Axes, points: Sequence[NamedPoint]) -> None:
    """Write names beside falling points, but for those that would cover the one before."""
    last = -math.inf
    low = math.inf
    for x, y, name in points:
        across, up = axes.transData.transform((x, y))
        if across - last > 110 or low - up > 12:
            axes.annotate(name, (x, y), xytext=(8, 5), textcoords="offset points")
            last = across
            low = up


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _write_plainly(axis: Axis) -> None:
    """Powers of ten, and between them 2 and 5, as numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}")
    axis.set_tick_params(which="minor", colors=SOFT, labelsize=SMALL, length=2)


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure as wide as the page; `height` is in tenths of the width.

    Raises:
        ConversionError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise lacking("matplotlib") from None
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(EDGE)
        axes.tick_params(colors=SOFT, labelsize=SMALL, length=3)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        yield figure, axes


def _svg(figure: Figure) -> Markup:
    """The figure as an element; whoever copies it out of the page has its colours too."""
    from markupsafe import Markup

    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    _, start, rest = drawn.getvalue().partition("<svg")
    return Markup(start + re.sub(r"((?<=fill: )|(?<=stroke: ))#[0-9a-f]{6}", _themed, rest))


def _themed(found: re.Match[str]) -> str:
    colour = found[0]
    return f"var(--{VARIABLES[colour]}, {colour})" if colour in VARIABLES else colour
