"""The report's charts, as SVG elements that stand inline in an HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["line_chart", "memory_chart"]

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
BLUE = "#2563eb"
ORANGE = "#ea580c"
RED = "#dc2626"

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}
# In a page the style sheet has the last word on colours, so that charts follow it into the dark.
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    RED: "var(--bad)",
}
# Steps on either side that the mean of a point takes in.
_SMOOTHING = 3


def line_chart(name: str, values: Sequence[float], *, color: str, y_label: str, limit: float | None = None) -> str:
    """Draw one value per optimizer step, pale, with its running mean over it.

    Args:
        name: Prefix of the element ids; unique in the page.
        values: One value per step.
        color: Line colour.
        y_label: Label of the value axis.
        limit: A level to mark with a dashed line, or None.

    Returns:
        An ``<svg>`` element.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _new_figure(width=5.6, height=3.1)
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, alpha=0.28, linewidth=1.2)
        axes.plot(steps, _running_mean(values), color=color, linewidth=2.2)
        if limit is not None:
            axes.axhline(limit, color=RED, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                f"clipped above {limit:g}",
                (1, limit),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=RED,
                fontsize=9,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(y_label)
        axes.margins(x=0.01)
        axes.set_ylim(bottom=0)
        return _inline_svg(figure, name)


def memory_chart(
    name: str,
    natural: Sequence[tuple[float, int]],
    planned: Sequence[tuple[float, int]],
    *,
    budget_bytes: int,
) -> str:
    """Draw live bytes over one accumulation cycle, without and with the plan, and the budget line.

    Time is shown as a share of the cycle, so that both curves tell of the same micro-batches.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _new_figure(width=11.4, height=3.6)
        for timeline, color, label in ((natural, MUTED, "natural"), (planned, BLUE, "planned and recorded")):
            shares, mebibytes = _as_shares(timeline)
            axes.fill_between(shares, mebibytes, step="post", color=color, alpha=0.12, linewidth=0)
            axes.plot(shares, mebibytes, drawstyle="steps-post", color=color, linewidth=1.4, label=label)
        axes.axhline(budget_bytes / 2**20, color=RED, linewidth=1.4, linestyle=(0, (4, 3)), label="budget")
        axes.set_xlabel("share of one accumulation cycle (4 × forward and backward, clip, step)")
        axes.set_ylabel("live MiB")
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper right", ncols=3)
        return _inline_svg(figure, name)


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.tick_params(length=0)
    return figure, axes


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, index - _SMOOTHING) : index + _SMOOTHING + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _as_shares(timeline: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    start, end = timeline[0][0], timeline[-1][0]
    duration = max(end - start, 1e-9)
    points = _thin(timeline)
    return [(seconds - start) / duration for seconds, _ in points], [size / 2**20 for _, size in points]


def _thin(timeline: Sequence[tuple[float, int]], keep: int = 1500) -> Sequence[tuple[float, int]]:
    """Keep each window's lowest and highest point: a chart needs no more, and no peak may be lost."""
    if len(timeline) <= keep:
        return timeline
    window = -(-len(timeline) // (keep // 2))
    points: list[tuple[float, int]] = []
    for begin in range(0, len(timeline), window):
        part = timeline[begin : begin + window]
        points.extend(sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}))
    return points


def _inline_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several charts share one page, so every id and every reference to it carries the chart's name.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(f": {color}", f": {variable}")
    return svg.replace("<metadata>", "<metadata hidden>", 1)
