"""The pictures of a run's steps: from its records to figures of loss, schedule, speed, time and memory, data.

Without matplotlib's global state.
"""

from __future__ import annotations

import math

import numpy
from matplotlib.figure import Figure

from megatron_xy.report.axes import (
    COLOURS,
    bound_to_usual,
    colour_of,
    dot_size,
    finish,
    mark_odd_steps,
    scatter_by_bucket,
    two_panels,
)
from megatron_xy.report.numbers import mean, ratio, short, smooth
from megatron_xy.report.records import Metrics

MOST_BARS = 120  # of a picture over the steps
PHASES = ("forward_backward", "optimizer", "data", "save", "evaluate")  # those of every run, from the bottom up


def draw_loss(metrics: Metrics) -> Figure:
    """Left: every step in its bucket's colour, odd steps marked; right: running means by source."""
    figure, left, right = two_panels(share_y=True)
    iteration, loss = metrics.column("iteration"), metrics.column("loss")
    scatter_by_bucket(left, metrics, loss)
    left.plot(iteration, smooth(loss), color="black", linewidth=1.8, label="running mean")
    mark_odd_steps(left, metrics)
    finish(left, title="loss by bucket", ylabel="loss (nats per token)")
    for index, (source, values) in enumerate(metrics.parts("loss_by_source").items()):
        right.plot(iteration, values, ".", color=colour_of(index), alpha=0.2, markersize=dot_size(len(values)) - 1)
        right.plot(iteration, smooth(values), color=colour_of(index), linewidth=1.8, label=source, zorder=3)
    finish(right, title="loss by source", ylabel="")
    return figure


def draw_schedule(metrics: Metrics) -> Figure:
    """Left: learning rate; right: gradient norm on a logarithmic scale, odd steps marked."""
    figure, left, right = two_panels(height=4.2)
    iteration, norm = metrics.column("iteration"), metrics.column("grad_norm")
    left.plot(iteration, metrics.column("lr"), color=COLOURS[0], linewidth=1.8)
    left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    left.set_ylim(bottom=0)
    finish(left, title="learning rate", ylabel="learning rate")
    right.plot(iteration, norm, ".", color=COLOURS[0], alpha=0.35, markersize=dot_size(len(norm)) - 1, label="step")
    right.plot(iteration, smooth(norm), color="black", linewidth=1.8, label="running mean")
    mark_odd_steps(right, metrics)
    if numpy.nanmax(numpy.append(norm, 0)) > 0:
        right.set_yscale("log")
    finish(right, title="gradient norm", ylabel="norm before clipping (log scale)")
    return figure


def draw_throughput(metrics: Metrics) -> Figure:
    """Left: tokens a second by bucket; right: seconds a step and the part of them that waits for data."""
    figure, left, right = two_panels()
    iteration, seconds = metrics.column("iteration"), metrics.column("step_seconds")
    waiting = metrics.column("data_wait_seconds")
    scatter_by_bucket(left, metrics, metrics.column("tokens_per_second"), medians=True)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda value, _: short(value))
    finish(left, title="tokens per second (line: median of the bucket)", ylabel="tokens/s, all ranks")
    right.plot(iteration, seconds, color=COLOURS[0], linewidth=1.2, label="step")
    share = ratio(waiting, seconds)
    label = f"waiting for data ({share:.1%})" if math.isfinite(share) else "waiting for data"
    right.fill_between(iteration, numpy.nan_to_num(waiting), color=COLOURS[1], alpha=0.8, label=label)
    bound_to_usual(right, seconds, unit="s")
    finish(right, title="seconds per step", ylabel="seconds")
    return figure


def draw_time_and_memory(metrics: Metrics) -> Figure:
    """Left: seconds a step by phase, stacked, means over stretches of a long run; right: peak memory."""
    figure, left, right = two_panels()
    iteration = metrics.column("iteration")
    parts = metrics.parts("seconds_by_phase")
    stretches = numpy.array_split(numpy.arange(len(iteration)), min(MOST_BARS, len(iteration)))
    starts = numpy.array([iteration[stretch[0]] for stretch in stretches])
    widths = numpy.array([len(stretch) for stretch in stretches])
    bottom = numpy.zeros(len(stretches))
    everything = sum(float(numpy.nansum(values)) for values in parts.values())
    for index, phase in enumerate(sorted(parts, key=lambda name: PHASES.index(name) if name in PHASES else 99)):
        seconds = numpy.nan_to_num(numpy.array([mean(parts[phase][stretch]) for stretch in stretches]))
        share = numpy.nansum(parts[phase]) / everything if everything > 0 else 0.0
        label = f"{phase.replace('_', ' ')} {share:.1%}"
        left.bar(starts - 0.5, seconds, widths, bottom=bottom, color=colour_of(index), align="edge", label=label)
        bottom = bottom + seconds
    bound_to_usual(left, bottom, unit="s")
    long = widths.max() > 1
    title = f"seconds a step by phase (means of {widths.max()} steps)" if long else "seconds a step by phase"
    finish(left, title=title, ylabel="seconds")
    memory = metrics.column("peak_memory_bytes") / 2**30
    right.plot(iteration, memory, color=COLOURS[0], linewidth=1.8)
    right.set_ylim(0, 1.1 * numpy.nanmax(numpy.append(memory, 1e-3)))
    finish(right, title="peak memory of the fullest rank", ylabel="GiB")
    return figure


def draw_data(metrics: Metrics) -> Figure:
    """Left: tokens that counted in the loss by bucket, and by source where the run noted it; right: padding."""
    figure, left, right = two_panels()
    buckets = metrics.buckets()
    positions = numpy.arange(len(buckets))
    parts = metrics.parts("num_loss_tokens_by_source") or {"all sources": metrics.column("num_loss_tokens")}
    bottom = numpy.zeros(len(buckets))
    for index, (source, values) in enumerate(parts.items()):
        heights = numpy.array([numpy.nansum(values[where]) for where in buckets.values()])
        left.bar(positions, heights, bottom=bottom, color=colour_of(index), width=0.65, label=source)
        bottom = bottom + heights
    for position, height, where in zip(positions, bottom, buckets.values(), strict=True):
        left.text(position, height, f"{where.sum()} steps", ha="center", va="bottom", fontsize=10)
    left.set_xticks(positions, [f"{bucket:,}" for bucket in buckets])
    left.margins(y=0.1)
    left.yaxis.set_major_formatter(lambda value, _: short(value))
    finish(left, title="tokens drawn by bucket", ylabel="loss tokens", xlabel="bucket (tokens a sample)")
    scatter_by_bucket(right, metrics, 100 * metrics.column("padding_ratio"), medians=True)
    right.set_ylim(bottom=0)
    finish(right, title="padding (line: median of the bucket)", ylabel="padding (% of the step's tokens)")
    return figure
