"""What all pictures of a report share: colours, dots by bucket, marks of odd steps, labels and the legend's place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_xy.report.numbers import median
from megatron_xy.report.records import Metrics

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # told apart by all eyes
LEGEND_CHARACTERS = 62  # that half a picture's width holds, four of them for each column's colour
CLOSE_DOTS = 400  # steps; beyond that a run's dots are drawn smaller


def two_panels(*, height: float = 4.6, share_y: bool = False) -> tuple[Figure, Any, Any]:
    """A picture as wide as the page, and the axes of its two halves."""
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=share_y)
    return figure, left, right


def colour_of(index: int) -> str:
    """Of a source, a phase and the like."""
    return COLOURS[index % len(COLOURS)]


def bucket_colours(count: int) -> Any:
    """Dark for short and bright for long buckets: [count, 4]."""
    return matplotlib.colormaps["plasma"](numpy.linspace(0.0, 0.82, max(1, count)))


def scatter_by_bucket(axes: Any, metrics: Metrics, values: NDArray[numpy.float64], *, medians: bool = False) -> None:
    """A dot a step in its bucket's colour, with a line at each bucket's median if asked for."""
    iteration, buckets = metrics.column("iteration"), metrics.buckets()
    size = dot_size(len(iteration))
    for (bucket, where), colour in zip(buckets.items(), bucket_colours(len(buckets)), strict=False):
        axes.plot(iteration[where], values[where], ".", color=colour, alpha=0.65, markersize=size, label=f"{bucket:,}")
        if medians and math.isfinite(usual := median(values[where])):
            axes.axhline(usual, color=colour, linewidth=1, alpha=0.7)


def dot_size(count: int) -> int:
    """In points, of so many steps' dots."""
    return 6 if count <= CLOSE_DOTS else 3


def mark_odd_steps(axes: Any, metrics: Metrics) -> None:
    """At the upper edge, where no loss or norm need be finite: steps that stand out, and steps that were skipped."""
    iteration = metrics.column("iteration")
    top = axes.get_xaxis_transform()
    for name, marker, colour in (("spike", "v", COLOURS[4]), ("skipped", "x", "#c00000")):
        steps = iteration[numpy.nan_to_num(metrics.column(name)) > 0]
        if len(steps):
            height = 0.985 if name == "spike" else 0.955  # a spike that was skipped shows both
            places = numpy.full(len(steps), height)
            label = f"{name} ({len(steps)})"
            axes.plot(
                steps, places, marker, color=colour, markersize=6, transform=top, clip_on=False, label=label, zorder=5
            )


def bound_to_usual(axes: Any, values: NDArray[numpy.float64], *, unit: str) -> None:
    """From 0 to a little above the usual values: a start or a stall must not flatten all other steps."""
    usual = 3 * median(values)
    longer = int((values > usual).sum())
    if longer:
        axes.set_ylim(top=1.2 * numpy.nanmax(values[values <= usual]))
        middle = float(numpy.mean(axes.get_xlim()))  # a bar of no height and colour: the legend's last entry
        axes.bar([middle], [0.0], color="none", label=f"{longer} above, up to {numpy.nanmax(values):.3g} {unit}")
    axes.set_ylim(bottom=0)


def finish(axes: Any, *, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    """Labels, a light grid, and the legend between title and axes, where it covers no data."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    columns = next((count for count in range(6, 1, -1) if _width(labels, columns=count) <= LEGEND_CHARACTERS), 1)
    rows = -(-len(handles) // columns)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=8 + 20 * min(rows, 1) + 15 * max(0, rows - 1))
    if handles:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=9.5,
            handlelength=1.0,
            handletextpad=0.4,
            columnspacing=1.1,
            borderaxespad=0.1,
        )


def _width(labels: Sequence[str], *, columns: int) -> int:
    """Of a legend, in characters; it is filled column by column."""
    rows = -(-len(labels) // columns)
    return sum(4 + max(map(len, labels[first : first + rows])) for first in range(0, len(labels), max(1, rows)))
