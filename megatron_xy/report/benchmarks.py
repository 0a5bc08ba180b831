"""What `evaluate --watch` found along a run: from evaluations.jsonl to curves of each benchmark."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from megatron_xy.report.axes import colour_of, finish
from megatron_xy.report.numbers import number
from megatron_xy.report.records import Metrics

HEADLINES = ("acc", "exact_match", "acc_norm", "f1")  # the first that a task has stands for it
# What a line says of how it was asked, besides the number of examples, and how people are told.
SETTING = {
    "limit": "first {} questions of each",
    "apply_chat_template": "as in a conversation: {}",
    "chat_template": "template {}",
    "tokenizer": "tokenizer {}",
    "data": "data {}",
}


def draw_benchmarks(metrics: Metrics, *, evaluations: Metrics) -> Figure:
    """A curve a task over the run's iterations, for each way in which it was asked; the label says what differs.

    Of an iteration that was saved and evaluated again the last line counts.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, dict[int, float]] = {}
    differing = [name for name in SETTING if len({str(record.get(name)) for record in evaluations.records}) > 1]
    for record in sorted(evaluations.records, key=lambda record: int(record["iteration"])):
        results = record.get("results") or {}
        # Of a group such as mmlu its mean, not its 57 parts; a tag has none, and stands for its parts.
        for task in [task for task in record.get("tasks") or () if task in results] or results:
            values = results[task]
            metric = next((name for name in HEADLINES if name in values), None)
            if metric is not None:
                label = ", ".join([f"{task} {metric}", *_setting(record, differing=differing)])
                curves.setdefault(label, {})[record["iteration"]] = number(values[metric])
    for index, (name, points) in enumerate(curves.items()):
        axes.plot([*points], [*points.values()], "o-", color=colour_of(index), linewidth=1.8, markersize=4, label=name)
    finish(axes, title="benchmarks", ylabel="share of the questions")
    return figure


def _setting(record: dict[str, Any], *, differing: list[str]) -> list[str]:
    """How a line's questions were put, as the label tells it."""
    examples = [] if record.get("num_fewshot") is None else [f"{record['num_fewshot']}-shot"]
    return examples + [_told(name, record.get(name)) for name in differing]


def _told(name: str, value: Any) -> str:
    if name == "limit" and value is None:
        return "all questions"
    if isinstance(value, bool) or value is None:
        value = {True: "yes", False: "no", None: "not named"}[value]
    return SETTING[name].format(value)
