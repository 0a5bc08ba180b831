"""The mixture that a run has drawn beside the one that its config asks for, and how often it went through its data."""

from __future__ import annotations

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_xy.config import RunConfig
from megatron_xy.data.draws.phases import sampler_phases
from megatron_xy.report.axes import colour_of, finish, two_panels
from megatron_xy.report.numbers import number
from megatron_xy.report.records import Metrics


def draw_mixture(metrics: Metrics, *, config: RunConfig) -> Figure:
    """Left: each source's part of all tokens so far, dashed what was asked for; right: its epochs."""
    figure, left, right = two_panels()
    iteration = metrics.column("iteration")
    wanted = wanted_shares(metrics.column("data_step"), config=config)
    for index, (source, share) in enumerate(metrics.parts("consumed_share_by_source").items()):
        left.plot(iteration, 100 * share, color=colour_of(index), linewidth=1.8, label=source)
        if source in wanted:
            left.plot(iteration, 100 * wanted[source], "--", color=colour_of(index), linewidth=1.2)
    if wanted:
        left.plot([], [], "--", color="black", linewidth=1.2, label="asked for")
    left.set_ylim(bottom=0)
    finish(left, title="drawn so far by source", ylabel="% of all tokens, padding included")
    for index, (source, epochs) in enumerate(most_epochs(metrics).items()):
        right.plot(iteration, epochs, color=colour_of(index), linewidth=1.8, label=source)
    right.set_ylim(bottom=0)
    finish(right, title="epochs by source", ylabel="times drawn, its most-drawn bucket")
    return figure


def wanted_shares(data_step: NDArray[numpy.float64], *, config: RunConfig) -> dict[str, NDArray[numpy.float64]]:
    """{source: its part of all tokens up to and with each data step, by the weights and phases of the config}.

    float64 [steps]; empty where any phase leaves the weights to the data's own amounts.
    """
    phases = sampler_phases(config)
    tokens = numpy.zeros_like(data_step)
    by_source: dict[str, NDArray[numpy.float64]] = {}
    ends = [*(phase.from_step for phase in phases[1:]), numpy.inf]
    for phase, end in zip(phases, ends, strict=True):
        if not phase.weights:
            return {}
        part = phase.global_batch_tokens * numpy.clip(numpy.minimum(data_step + 1, end) - phase.from_step, 0, None)
        tokens = tokens + part
        total = sum(phase.weights.values())
        for source, weight in phase.weights.items():
            by_source[source] = by_source.get(source, numpy.zeros_like(data_step)) + part * weight / total
    return {source: part / numpy.maximum(tokens, 1.0) for source, part in by_source.items()}


def most_epochs(metrics: Metrics) -> dict[str, NDArray[numpy.float64]]:
    """{source: epochs of its most-drawn bucket}, float64 [steps]."""
    most = [
        {source: max(map(number, buckets.values()), default=0.0) for source, buckets in epochs.items()}
        if isinstance(epochs := record.get("epochs_by_source"), dict)
        else {}
        for record in metrics.records
    ]
    return Metrics([{"epochs": row} for row in most]).parts("epochs")
