"""The page's own tables: summary, last evaluation, epochs, odd steps and stragglers, phases, and the run's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_xy.report.evaluation import evaluation_rows
from megatron_xy.report.numbers import number, shown
from megatron_xy.report.page import ReportSection
from megatron_xy.report.records import Metrics

MOST_EVENTS = 100  # on the page; all of them lie in events.jsonl
WHAT_LIES_WHERE = {
    "run.yaml": "the whole configuration, defaults included",
    "env.json": "machine and versions",
    "metrics.jsonl": "one record a step",
    "eval.jsonl": "one record an evaluation",
    "evaluations.jsonl": "one record a checkpoint that `evaluate --watch` has put to benchmarks",
    "events.jsonl": "steps that stand out or were skipped, with their samples; stragglers",
    "logs": "what every rank said",
    "checkpoints": "weights, optimizer, schedule, random states, data position",
    "report/summary.json": "this table for programs",
}


def own_sections(
    summary: Mapping[str, Any],
    rows: Sequence[tuple[str, str]],
    *,
    events: Metrics,
    run_dir: Path,
    timings: Mapping[str, float] | None,
) -> list[ReportSection]:
    """In the page's order, `rows` of the summary first; what a run has none of is left out."""
    sections = [ReportSection("Summary", rows=[("what", "value"), *rows])]
    evaluation = summary.get("last_evaluation")
    if evaluation and "loss_by_bucket" in evaluation:  # a reward model's has a section of its own
        table = [("held out", "loss", "perplexity"), *evaluation_rows(evaluation)]
        sections.append(ReportSection(f"Evaluation after step {evaluation['iteration']:,}", rows=table))
    if summary.get("epochs_by_source"):
        sections.append(ReportSection("Epochs", rows=_epoch_rows(summary["epochs_by_source"])))
    if events.records:
        sections.append(_events(events.records))
    if timings:
        rows_of_phases = [(phase, f"{seconds:.1f}") for phase, seconds in timings.items()]
        sections.append(ReportSection("Phases", rows=[("phase", "seconds"), *rows_of_phases]))
    there = [(str(run_dir / name), what) for name, what in WHAT_LIES_WHERE.items() if (run_dir / name).exists()]
    sections.append(ReportSection("Where everything lies", rows=[("path", "what"), *there]))
    return sections


def _epoch_rows(epochs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """How often each (source, bucket) was drawn: a row a source, a column a bucket."""
    buckets = sorted({bucket for of_source in epochs.values() for bucket in of_source}, key=int)
    rows = [["source", *(f"bucket {int(bucket):,}" for bucket in buckets)]]
    for source, times in epochs.items():
        cells = [shown(number(times[bucket]), "{:.3f}") if bucket in times else "no samples" for bucket in buckets]
        rows.append([source, *cells])
    return rows


def _events(records: list[dict[str, Any]]) -> ReportSection:
    """Skipped steps, spikes and stragglers with their reasons, the last ones where they are many."""
    rows = [("step", "what", "why")]
    for record in records[-MOST_EVENTS:]:
        rows.append((f"{record['iteration']:,}", *_what_and_why(record)))
    left_out = len(records) - MOST_EVENTS
    statements = [f"the last {MOST_EVENTS} of {len(records)}; all lie in events.jsonl"] if left_out > 0 else []
    return ReportSection("Odd steps and stragglers", statements=statements, rows=rows)


def _what_and_why(record: dict[str, Any]) -> tuple[str, str]:
    if "straggler" in record:
        return (
            f"straggler: rank {record['straggler']}",
            f"busy for {shown(number(record.get('busy_seconds')), '{:.3f}')} s a step, "
            f"{shown(number(record.get('factor')), '{:.1f}')} times the other ranks' median for its work",
        )
    what = ", ".join(name for name in ("spike", "skipped") if record.get(name)) or "event"
    place = f"data step {record['data_step']}, bucket {record['bucket']}: " if "bucket" in record else ""
    return what, place + "; ".join(map(str, record.get("reasons", ())))
