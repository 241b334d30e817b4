"""Small pieces of self-contained HTML reports: pages, tables, plots as inline SVG, images as data
URIs."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConversionError

COLOURS = (
    "#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2", "#65a30d", "#78350f", "#64748b", "#ea580c",
)  # fmt: skip
STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class Line:
    """One line of a plot; values that a logarithmic axis cannot show leave a gap."""

    title: str
    values: Sequence[float]


@dataclass(frozen=True)
class Series:
    """Points of one kind, (x, y, label) each; hollow ones are not to be compared with the
    others."""

    title: str
    points: Sequence[tuple[float, float, str]]
    hollow: bool = False


def page(title: str, body: str) -> str:
    """A whole page, with nothing to fetch."""
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    head = f"<head>{head}<style>\n{STYLE.read_text()}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body><main>{body}</main></body></html>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML; `numbers` are the columns to align to the right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return (
        "<div"
        f' class="scroll"><table><thead>{row("th", head)}</thead><tbody>{body}</tbody></table></div>'
    )


def badge(good: bool, words: str) -> str:
    """A short verdict."""
    return f'<span class="badge {"good" if good else "bad"}">{escape(words)}</span>'


def facts(entries: Mapping[str, Any]) -> str:
    """Names and values, one a row; values are escaped."""
    return table(
        ("", ""),
        [(escape(key), f"<code>{escape(str(value))}</code>") for key, value in entries.items()],
    )


def log_plot(
    lines: Sequence[Line],
    labels: Sequence[str],
    limit: float | None = None,
    marked: int | None = None,
) -> str:
    """Lines over named steps on a logarithmic axis, as SVG.

    Args:
        labels: a name for each step; the first and the last are shown.
        limit: drawn across, such as a tolerance.
        marked: the step to point at.
    """
    figure, axes = _axes()
    for line, colour in zip(lines, COLOURS, strict=False):
        values = [value if 0 < value < math.inf else math.nan for value in line.values]
        axes.plot(values, color=colour, label=line.title, linewidth=1.4, marker="o", markersize=2.6)
    if limit:
        axes.axhline(
            limit,
            color="#c02626",
            linewidth=0.9,
            linestyle=(0, (2, 3)),
            label=f"tolerance {limit:.0e}",
        )
    if marked is not None:
        axes.axvspan(marked - 0.5, marked + 0.5, color="#fdeaea", zorder=0)
        axes.annotate(labels[marked], (marked, 1), xycoords=("data", "axes fraction"), xytext=(6, -11),
                      textcoords="offset points", fontsize=8, color="#c02626")  # fmt: skip
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.tick_params(axis="y", which="minor", left=False, labelleft=False)
    axes.set_xticks([0, len(labels) - 1], [labels[0], labels[-1]])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=8)
    return _svg(figure)


def scatter_plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    front: Sequence[tuple[float, float, str]],
    limit: float | None,
) -> str:
    """Points on two logarithmic axes, those of a series joined by a thin line, as SVG.

    Args:
        front: points to mark, name, and join by a staircase, in the order of x.
        limit: drawn across if it is near the points; below it y says nothing.
    """
    figure, axes = _axes(height=4.4)
    lowest = math.inf
    for index, (one, marker) in enumerate(zip(series, itertools.cycle("os^Dv"), strict=False)):
        shown = [(x, y) for x, y, _ in one.points if 0 < y < math.inf]
        lowest = min([lowest, *(y for _, y in shown)])
        colour = COLOURS[index % len(COLOURS)]
        fill = "white" if one.hollow else colour
        axes.plot(*_columns(shown), color=colour, linewidth=0.5, marker=marker, markersize=5, markerfacecolor=fill,
                  label=one.title)  # fmt: skip
    marked = [(x, y) for x, y, _ in front if y > 0]
    axes.plot(*_columns(marked), color="#1c2430", drawstyle="steps-post", linewidth=1.1, marker="o", markersize=11,
              markerfacecolor="none", label="Pareto front", gid="front")  # fmt: skip
    if limit and limit > lowest / 10:
        axes.axhline(
            limit,
            color="#c02626",
            linewidth=0.9,
            linestyle=(0, (2, 3)),
            label="reference's own error",
        )
    for axis, title in ((axes.xaxis, x_title), (axes.yaxis, y_title)):
        _logarithmic(axis)
        axis.set_label_text(title, fontsize=8, color="#66707f")
    axes.margins(0.06)
    _name(axes, [point for point in front if point[1] > 0])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return _svg(figure)


def _name(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside falling points, but for those that would cover the one before."""
    last, low = -math.inf, math.inf
    for x, y, name in points:
        across, up = axes.transData.transform((x, y))
        if across - last > 110 or low - up > 12:
            axes.annotate(name, (x, y), xytext=(8, 5), textcoords="offset points", fontsize=8)
            last, low = across, up


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _logarithmic(axis: Any) -> None:
    """Powers of ten, and between them 2 and 5, written as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)
    axis.set_tick_params(which="minor", colors="#66707f", labelsize=8, length=2)


def _axes(height: float = 3) -> tuple[Any, Any]:
    """An empty figure as wide as the page, in its colours; `height` is in tenths of the width."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConversionError(
            'a report needs matplotlib; run `pip install "weightport[report]"`'
        ) from None
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9d0d8")
    axes.tick_params(colors="#66707f", labelsize=8, length=3)
    axes.grid(axis="y", color="#eef1f4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as an inline SVG element, text as text, the same bytes for the same figure."""
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "weightport", "font.family": "sans-serif"}
    ):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def figure(image: np.ndarray[Any, Any], caption: str) -> str:
    """A uint8 image (h, w, 3) with words below."""
    words = escape(caption)
    return (
        f'<figure><img alt="{words}"'
        f' src="{data_uri(image)}"><figcaption>{words}</figcaption></figure>'
    )


def data_uri(image: np.ndarray[Any, Any]) -> str:
    """A uint8 image (h, w, 3) as a PNG inside a URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
