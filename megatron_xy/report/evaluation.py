"""A run's evaluations beside its training: from eval.jsonl to one picture and the table of the last one."""

from __future__ import annotations

import math
from typing import Any

import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_xy.report.axes import bucket_colours, colour_of, finish
from megatron_xy.report.numbers import number, short, shown, smooth
from megatron_xy.report.records import Metrics

TRAINING = "#8a8a8a"
FIELDS = {"loss_by_bucket": "bucket", "loss_by_source": "source", "loss_by_position": "positions"}


def draw_evaluation(metrics: Metrics, *, evaluations: Metrics) -> Figure:
    """Held-out loss in all with its perplexity, by bucket, by source, by position; dashed: the training's own."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    (whole, by_bucket), (by_source, by_position) = figure.subplots(2, 2)
    steps, iteration, loss = evaluations.column("iteration"), metrics.column("iteration"), metrics.column("loss")
    _line(whole, steps, evaluations.column("loss"), colour="black", label="held out")
    _training(whole, iteration, loss, colour=TRAINING, label="training, running mean")
    finish(whole, title="held-out loss and perplexity", ylabel="loss (nats per token)")
    _scale_of_perplexity(whole)

    drawn = metrics.buckets()
    buckets = evaluations.parts("loss_by_bucket")
    for (bucket, values), colour in zip(buckets.items(), bucket_colours(len(buckets)), strict=False):
        _line(by_bucket, steps, values, colour=colour, label=f"{int(bucket):,}")
        if (where := drawn.get(int(bucket))) is not None:
            _training(by_bucket, iteration[where], loss[where], colour=colour)
    finish(by_bucket, title="held out, by bucket (dashed: training)", ylabel="")

    trained = metrics.parts("loss_by_source")
    for index, (source, values) in enumerate(evaluations.parts("loss_by_source").items()):
        _line(by_source, steps, values, colour=colour_of(index), label=source)
        if source in trained:
            _training(by_source, iteration, trained[source], colour=colour_of(index))
    finish(by_source, title="held out, by source (dashed: training)", ylabel="loss (nats per token)")

    ranges = evaluations.parts("loss_by_position")
    for (name, values), colour in zip(ranges.items(), bucket_colours(len(ranges)), strict=False):
        _line(by_position, steps, values, colour=colour, label=name)
    _training(by_position, iteration, loss, colour=TRAINING, label="training")
    finish(by_position, title="held out, by position in the document", ylabel="")
    return figure


def evaluation_rows(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, loss and perplexity: the last evaluation as rows of a table."""
    rows = [("all", number(record.get("loss")))]
    for field, what in FIELDS.items():
        parts = record.get(field)
        rows += [(f"{what} {name}", number(loss)) for name, loss in (parts if isinstance(parts, dict) else {}).items()]
    return [(what, shown(loss, "{:.4f}"), shown(_perplexity(loss), "{:,.2f}")) for what, loss in rows]


def _line(axes: Any, x: NDArray[numpy.float64], y: NDArray[numpy.float64], *, colour: Any, label: str) -> None:
    axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=4, label=label)


def _training(
    axes: Any, x: NDArray[numpy.float64], y: NDArray[numpy.float64], *, colour: Any, label: str | None = None
) -> None:
    axes.plot(x, smooth(y), "--", color=colour, linewidth=1.1, alpha=0.8, label=label)


def _scale_of_perplexity(axes: Any) -> None:
    """The same heights once more on the right, as e to the loss."""
    scale = axes.twinx()
    scale.set_ylim(axes.get_ylim())
    scale.yaxis.set_major_formatter(lambda loss, _: short(float(f"{_perplexity(loss):.3g}")))
    scale.set_ylabel("perplexity")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan
