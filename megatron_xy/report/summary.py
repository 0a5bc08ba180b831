"""A run in a few numbers: from records, config and machine to summary.json and the page's first table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from megatron_xy.config import RunConfig
from megatron_xy.flops import num_parameters
from megatron_xy.report.numbers import last, mean, median, number, of_finite, ratio, shown
from megatron_xy.report.records import Metrics


def summarise(
    metrics: Metrics,
    *,
    config: RunConfig,
    environment: Mapping[str, Any],
    evaluations: Metrics | None = None,
) -> dict[str, Any]:
    """The run in a few numbers, by name; losses over the first and last steps are means of up to 10 steps."""
    loss, speed, iteration = (metrics.column(name) for name in ("loss", "tokens_per_second", "iteration"))
    last_bucket_loss = {bucket: mean(loss[where][-10:]) for bucket, where in metrics.buckets().items()}
    model, parallel = config.model, config.parallel
    return {
        "task": config.task,
        "num_parameters": None if model.missing_shape else num_parameters(model),
        "model": {
            name: getattr(model, name)
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        }
        | {"vocab_size": model.vocab_size, "params_dtype": model.params_dtype},
        "parallel": {
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "context": parallel.context_parallel_size,
            "model_parallel_size": parallel.model_parallel_size,
            "sequence_parallel": parallel.sequence_parallel,
        },
        "environment": {key: value for key, value in environment.items() if isinstance(value, str | int | float)},
        "last_iteration": int(iteration[-1]),
        "train_iters": config.training.train_iters,
        "skipped_steps": int(numpy.nansum(metrics.column("skipped"))),
        "spike_steps": int(numpy.nansum(metrics.column("spike"))),
        "first_loss": number(loss[0]),
        "last_loss": mean(loss[-10:]),
        "last_loss_by_bucket": last_bucket_loss,
        "last_loss_by_source": {
            source: mean(values[-10:]) for source, values in metrics.parts("loss_by_source").items()
        },
        "last_evaluation": evaluations.records[-1] if evaluations and evaluations.records else None,
        "consumed_tokens": last(metrics.column("consumed_tokens")),
        "consumed_share_by_source": _last_field(metrics, "consumed_share_by_source"),
        "epochs_by_source": _last_field(metrics, "epochs_by_source"),
        "peak_memory_bytes": of_finite(metrics.column("peak_memory_bytes"), numpy.max),
        "median_tokens_per_second": median(speed),
        "median_tokens_per_second_by_bucket": {
            bucket: median(speed[where]) for bucket, where in metrics.buckets().items()
        },
        "median_mfu": median(metrics.column("mfu")),
        "step_seconds": float(numpy.nansum(metrics.column("step_seconds"))),
        "data_wait_share": ratio(metrics.column("data_wait_seconds"), metrics.column("step_seconds")),
        "padding_ratio": mean(metrics.column("padding_ratio")),
    }


def _last_field(metrics: Metrics, name: str) -> dict[str, Any]:
    """The last record's {part: ...}; empty where the run does not note it."""
    field = metrics.records[-1].get(name)
    return field if isinstance(field, dict) else {}


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) as they stand on the page."""
    model, parallel, environment = summary["model"], summary["parallel"], summary["environment"]
    parameters = summary["num_parameters"]
    world_size = environment.get("world_size")
    data = f" x data {world_size // parallel['model_parallel_size']}" if isinstance(world_size, int) else ""
    rows = [
        ("task", summary["task"]),
        ("parameters", f"{parameters:,}" if parameters else "not known: the shape came with the loaded model"),
        ("model", ", ".join(f"{name} {value}" for name, value in model.items() if value is not None)),
        (
            "parallel layout",
            f"tensor {parallel['tensor']} x pipeline {parallel['pipeline']} x context {parallel['context']}{data}, "
            f"sequence parallel {'on' if parallel['sequence_parallel'] else 'off'}",
        ),
        (
            "steps",
            f"{summary['last_iteration']:,} of {summary['train_iters']:,}, {summary['skipped_steps']} skipped, "
            f"{summary['spike_steps']} spikes",
        ),
        ("loss, first step", shown(summary["first_loss"], "{:.4f}")),
        ("loss, mean of the last 10 steps", shown(summary["last_loss"], "{:.4f}")),
    ]
    for source, loss in summary["last_loss_by_source"].items():
        rows.append((f"loss on {source}, last 10 steps", shown(loss, "{:.4f}")))
    if evaluation := summary["last_evaluation"]:
        of_pairs = evaluation.get("held_out") or {}
        what = f"held-out loss after step {evaluation['iteration']:,}"
        rows.append((what, shown(number(evaluation.get("loss", of_pairs.get("loss"))), "{:.4f}")))
        if of_pairs:
            rows.append(("held-out pairs in the right order", shown(number(of_pairs.get("accuracy")), "{:.2%}")))
    rows.append(("tokens consumed", shown(summary["consumed_tokens"], "{:,.0f}")))
    for bucket, speed in summary["median_tokens_per_second_by_bucket"].items():
        rows.append((f"median tokens/s, bucket {bucket:,}", shown(speed, "{:,.0f}")))
    rows += [
        (
            "median MFU (on a CPU: of the matrix-product rate measured at start)",
            shown(summary["median_mfu"], "{:.1%}"),
        ),
        ("seconds in steps", shown(summary["step_seconds"], "{:,.1f}")),
        ("of them waiting for data", shown(summary["data_wait_share"], "{:.1%}")),
        ("padding, mean of the steps", shown(summary["padding_ratio"], "{:.1%}")),
        ("peak memory of the fullest rank, GiB", shown(summary["peak_memory_bytes"] / 2**30, "{:.2f}")),
    ]
    return rows + [(key.replace("_", " "), str(value)) for key, value in environment.items()]
