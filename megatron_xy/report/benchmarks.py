"""What `evaluate --watch` found along a run: from evaluations.jsonl to curves of each benchmark."""

from __future__ import annotations

from matplotlib.figure import Figure

from megatron_xy.report.axes import colour_of, finish
from megatron_xy.report.numbers import number
from megatron_xy.report.records import Metrics

HEADLINES = ("acc", "exact_match", "acc_norm", "f1")  # the first that a task has stands for it


def draw_benchmarks(metrics: Metrics, *, evaluations: Metrics) -> Figure:
    """A curve a task over the run's iterations."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in sorted(evaluations.records, key=lambda record: int(record["iteration"])):
        results = record.get("results") or {}
        # Of a group such as mmlu its mean, not its 57 parts; a tag has none, and stands for its parts.
        for task in [task for task in record.get("tasks") or () if task in results] or results:
            values = results[task]
            metric = next((name for name in HEADLINES if name in values), None)
            if metric is not None:
                examples = f", {record['num_fewshot']}-shot" if record.get("num_fewshot") is not None else ""
                curves.setdefault(f"{task} {metric}{examples}", []).append(
                    (record["iteration"], number(values[metric]))
                )
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), "o-", color=colour_of(index), linewidth=1.8, markersize=4, label=name)
    finish(axes, title="benchmarks", ylabel="share of the questions")
    return figure
