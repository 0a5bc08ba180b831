"""What a reward model's report shows: accuracy, both answers' scores, their scale, and which epoch is fit for use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_xy.config import RewardConfig
from megatron_xy.report.axes import COLOURS, finish
from megatron_xy.report.numbers import number, smooth
from megatron_xy.report.page import ReportSection
from megatron_xy.report.records import Metrics
from megatron_xy.reward.select import select, written

PARTS = {"held_out": "held out", "training": "training, as many"}


def draw_pairs(metrics: Metrics, *, evaluations: Metrics, reward: RewardConfig) -> Figure:
    """Accuracy; scores of the better and the worse answer; their scale within the band; accuracy by group."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    (accuracy, means), (scale, groups) = figure.subplots(2, 2)
    iteration, steps = metrics.column("iteration"), evaluations.column("iteration")
    accuracy.plot(iteration, 100 * smooth(metrics.column("accuracy")), color="#8a8a8a", label="steps, running mean")
    for (part, label), colour in zip(PARTS.items(), COLOURS, strict=False):
        accuracy.plot(steps, 100 * _column(evaluations, part, "accuracy"), "o-", color=colour, label=label)
    finish(accuracy, title="pairs in the right order", ylabel="%")
    for name, colour in (("chosen_mean", COLOURS[2]), ("rejected_mean", COLOURS[1])):
        label = name.removesuffix("_mean")
        means.plot(iteration, smooth(metrics.column(name)), "--", color=colour, linewidth=1.1, label=f"{label}, steps")
        means.plot(steps, _column(evaluations, "held_out", name), "o-", color=colour, label=f"{label}, held out")
    finish(means, title="scores of both answers, mean", ylabel="score")
    middle, spread, low, high = (
        _column(evaluations, "held_out", name) for name in ("score_mean", "score_std", "score_min", "score_max")
    )
    scale.axhspan(*reward.score_band, color=COLOURS[2], alpha=0.08, label="score_band")
    scale.vlines(steps, low, high, color="#8a8a8a", linewidth=1, label="range")
    scale.errorbar(steps, middle, yerr=spread, fmt="o", color="black", capsize=4, label="mean, one deviation")
    scale.set_xlim(0, 1.05 * max(steps))
    finish(scale, title="scale of the held-out scores", ylabel="score")
    by_group = _groups(evaluations.records[-1])
    places = numpy.arange(len(by_group))
    groups.barh(places, [100 * value for value in by_group.values()], color=COLOURS[0], height=0.6)
    groups.set_yticks(places, list(by_group))
    groups.invert_yaxis()
    groups.set_xlim(0, 100)
    finish(groups, title="held out, by source and by models, last", ylabel="", xlabel="% in the right order")
    return figure


def epoch_section(run_dir: Path) -> ReportSection:
    """Each epoch's numbers, and what `select` says of it."""
    selection = select(run_dir)
    rows: list[tuple[str, ...]] = [("epoch", "step", "accuracy", "on training pairs", "margin", "scores", "verdict")]
    for epoch in selection.epochs:
        verdict = "selected" if epoch is selection.chosen else "; ".join(epoch.problems) or "fit"
        rows.append(
            (
                str(epoch.epoch),
                f"{epoch.iteration:,}",
                f"{epoch.accuracy:.2%}",
                f"{epoch.training_accuracy:.2%}",
                written(epoch.margin),
                f"{written(epoch.score_mean)} +- {written(epoch.score_std)}",
                verdict,
            )
        )
    return ReportSection("Epochs, and the one to take", rows=rows)


def has_epochs(evaluations: Metrics) -> bool:
    """Whether there is an epoch to speak of that was measured on held-out pairs."""
    return any(record.get("ends_epoch") and record.get("held_out") for record in evaluations.records)


def _column(evaluations: Metrics, part: str, name: str) -> NDArray[numpy.float64]:
    """One number an evaluation; NaN where that part was not measured."""
    return numpy.array([number((record.get(part) or {}).get(name)) for record in evaluations.records])


def _groups(record: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by what the pairs' sources and models are called; of the training pairs where none are held out."""
    numbers = record.get("held_out") or record.get("training") or {}
    return {
        f"{kind} {name}": number(value)
        for kind in ("source", "model")
        for name, value in (numbers.get(f"accuracy_by_{kind}") or {}).items()
    }
