"""A finished or running training run as pictures and one self-contained page.

From RUN/metrics.jsonl, run.yaml and env.json to RUN/report/: PNG files, summary.json and index.html, which holds
everything in itself and may be sent around. Without torch, and without matplotlib's global state.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megatron_xy.config import RunConfig, load_config
from megatron_xy.errors import ConfigError, DataError, StorageError
from megatron_xy.flops import num_parameters

SOURCE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # told apart by all eyes
WHAT_LIES_WHERE = {
    "run.yaml": "the whole configuration, defaults included",
    "env.json": "machine and versions",
    "metrics.jsonl": "one record a step",
    "logs": "what every rank said",
    "checkpoints": "weights, optimizer, schedule, random states, data position",
    "report/summary.json": "this table for programs",
}


@dataclass(frozen=True)
class ReportSection:
    """What a caller adds to the page: statements, a table (its first row is the head), and text shown as it stands."""

    title: str
    statements: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: str = ""


@dataclass(frozen=True)
class Metrics:
    """The records of a run, in the order of their steps. A number that is absent, null or not finite reads as NaN."""

    records: list[dict[str, Any]]

    def column(self, name: str) -> NDArray[numpy.float64]:
        """One number a step: float64 [steps]."""
        return numpy.array([_number(record.get(name)) for record in self.records])

    def by_source(self, name: str) -> dict[str, NDArray[numpy.float64]]:
        """Of a field that holds {source: number}: float64 [steps] for every source."""
        fields = [field if isinstance(field := record.get(name), dict) else {} for record in self.records]
        sources = sorted({source for field in fields for source in field})
        return {source: numpy.array([_number(field.get(source)) for field in fields]) for source in sources}

    def buckets(self) -> dict[int, NDArray[numpy.bool_]]:
        """{bucket: which steps drew it}, bool [steps]."""
        column = self.column("bucket")
        return {int(bucket): column == bucket for bucket in numpy.unique(column[numpy.isfinite(column)])}


def make_report(
    run_dir: Path, *, timings: Mapping[str, float] | None = None, sections: Sequence[ReportSection] = ()
) -> Path:
    """Writes RUN/report/ and returns its index.html.

    `timings` are phases and their seconds; `sections` come after the summary, in order. Raises ConfigError where the
    folder holds no run, DataError where its metrics are empty or damaged, StorageError where nothing can be written.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    config = load_config(run_dir / "run.yaml")
    summary = summarise(metrics, config=config, environment=_read_environment(run_dir / "env.json"))
    if timings:
        summary["seconds_by_phase"] = dict(timings)
    figures: dict[str, tuple[Callable[[Metrics], Figure], str]] = {
        "loss": (draw_loss, "Loss a step; a dot is a step in the colour of its bucket, a line a running mean."),
        "learning_rate_and_grad_norm": (draw_schedule, "Learning rate and the gradient's norm before clipping."),
        "throughput": (draw_throughput, "Speed of all ranks together, and what a step spends waiting for data."),
        "data": (draw_data, "What was drawn, and how much of it was padding."),
    }
    folder = run_dir / "report"
    pictures: list[tuple[bytes, str]] = []
    for name, (draw, caption) in figures.items():
        with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
            image = io.BytesIO()
            draw(metrics).savefig(image, format="png", dpi=120, facecolor="white")
        _write(folder / f"{name}.png", image.getvalue())
        pictures.append((image.getvalue(), caption))
    _write(folder / "summary.json", (json.dumps(_without_nan(summary), indent=2) + "\n").encode())
    parts = [_section_html(section) for section in (*_own_sections(summary, run_dir, timings), *sections)]
    _write(folder / "index.html", _page(run_dir.name, parts=parts, pictures=pictures).encode())
    return folder / "index.html"


def read_metrics(path: Path) -> Metrics:
    """The records of a metrics.jsonl; an unfinished last line, of a run that is still writing, is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; name a run's folder, after its first step") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline yet
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise DataError(f"{path}:{number}: not a record of a step (an object with its iteration); delete the line")
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no step yet; wait for the first step, or look into {path.parent / 'logs'}")
    return Metrics(records)


def summarise(metrics: Metrics, *, config: RunConfig, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The run in a few numbers, by name; losses over the first and last steps are means of up to 10 steps."""
    loss, speed, iteration = (metrics.column(name) for name in ("loss", "tokens_per_second", "iteration"))
    last_bucket_loss = {bucket: _mean(loss[where][-10:]) for bucket, where in metrics.buckets().items()}
    model, parallel = config.model, config.parallel
    sizes = (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.vocab_size)
    return {
        "task": config.task,
        "num_parameters": num_parameters(model) if None not in sizes else None,
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
        "first_loss": _number(loss[0]),
        "last_loss": _mean(loss[-10:]),
        "last_loss_by_bucket": last_bucket_loss,
        "last_loss_by_source": {
            source: _mean(values[-10:]) for source, values in metrics.by_source("loss_by_source").items()
        },
        "consumed_tokens": _last(metrics.column("consumed_tokens")),
        "median_tokens_per_second": _median(speed),
        "median_tokens_per_second_by_bucket": {
            bucket: _median(speed[where]) for bucket, where in metrics.buckets().items()
        },
        "median_mfu": _median(metrics.column("mfu")),
        "step_seconds": float(numpy.nansum(metrics.column("step_seconds"))),
        "data_wait_share": _ratio(metrics.column("data_wait_seconds"), metrics.column("step_seconds")),
        "padding_ratio": _mean(metrics.column("padding_ratio")),
    }


def draw_loss(metrics: Metrics) -> Figure:
    """Left: every step in its bucket's colour; right: running means by source."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    iteration, loss = metrics.column("iteration"), metrics.column("loss")
    _scatter_by_bucket(left, metrics, loss)
    left.plot(iteration, _smooth(loss), color="black", linewidth=1.8, label="running mean")
    _finish(left, title="loss by bucket", ylabel="loss (nats per token)")
    for (source, values), colour in zip(
        metrics.by_source("loss_by_source").items(), _cycle(SOURCE_COLOURS), strict=False
    ):
        right.plot(iteration, values, ".", color=colour, alpha=0.25, markersize=5)
        right.plot(iteration, _smooth(values), color=colour, linewidth=1.8, label=source)
    _finish(right, title="loss by source", ylabel="")
    return figure


def draw_schedule(metrics: Metrics) -> Figure:
    """Left: learning rate; right: gradient norm on a logarithmic scale, skipped steps marked."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    iteration, norm = metrics.column("iteration"), metrics.column("grad_norm")
    left.plot(iteration, metrics.column("lr"), color=SOURCE_COLOURS[0], linewidth=1.8)
    left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    left.set_ylim(bottom=0)
    _finish(left, title="learning rate", ylabel="learning rate")
    right.plot(iteration, norm, ".", color=SOURCE_COLOURS[0], alpha=0.35, markersize=5, label="step")
    right.plot(iteration, _smooth(norm), color="black", linewidth=1.8, label="running mean")
    for number, step in enumerate(iteration[numpy.nan_to_num(metrics.column("skipped")) > 0]):
        right.axvline(step, color=SOURCE_COLOURS[1], linewidth=1, label="skipped" if number == 0 else None)
    if numpy.nanmax(numpy.append(norm, 0)) > 0:
        right.set_yscale("log")
    _finish(right, title="gradient norm", ylabel="norm before clipping (log scale)")
    return figure


def draw_throughput(metrics: Metrics) -> Figure:
    """Left: tokens a second by bucket; right: seconds a step and the part of them that waits for data."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    iteration, seconds = metrics.column("iteration"), metrics.column("step_seconds")
    waiting = metrics.column("data_wait_seconds")
    _scatter_by_bucket(left, metrics, metrics.column("tokens_per_second"), medians=True)
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(lambda value, _: _short(value))
    _finish(left, title="tokens per second (line: median of the bucket)", ylabel="tokens/s, all ranks")
    right.plot(iteration, seconds, color=SOURCE_COLOURS[0], linewidth=1.2, label="step")
    share = _ratio(waiting, seconds)
    label = f"waiting for data ({share:.1%})" if math.isfinite(share) else "waiting for data"
    right.fill_between(iteration, numpy.nan_to_num(waiting), color=SOURCE_COLOURS[1], alpha=0.8, label=label)
    usual = 3 * _median(seconds)
    longer = int((seconds > usual).sum())
    if longer:  # a start or a stall must not flatten all other steps
        right.set_ylim(top=1.2 * numpy.nanmax(seconds[seconds <= usual]))
        right.plot([], [], " ", label=f"{longer} above, up to {numpy.nanmax(seconds):.1f} s")
    right.set_ylim(bottom=0)
    _finish(right, title="seconds per step", ylabel="seconds")
    return figure


def draw_data(metrics: Metrics) -> Figure:
    """Left: tokens that counted in the loss by bucket, and by source where the run noted it; right: padding."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    buckets = metrics.buckets()
    positions = numpy.arange(len(buckets))
    parts = metrics.by_source("num_loss_tokens_by_source") or {"all sources": metrics.column("num_loss_tokens")}
    bottom = numpy.zeros(len(buckets))
    for (source, values), colour in zip(parts.items(), _cycle(SOURCE_COLOURS), strict=False):
        heights = numpy.array([numpy.nansum(values[where]) for where in buckets.values()])
        left.bar(positions, heights, bottom=bottom, color=colour, width=0.65, label=source)
        bottom = bottom + heights
    for position, height, where in zip(positions, bottom, buckets.values(), strict=True):
        left.text(position, height, f"{where.sum()} steps", ha="center", va="bottom", fontsize=10)
    left.set_xticks(positions, [f"{bucket:,}" for bucket in buckets])
    left.margins(y=0.1)
    left.yaxis.set_major_formatter(lambda value, _: _short(value))
    _finish(left, title="tokens drawn by bucket", ylabel="loss tokens", xlabel="bucket (tokens a sample)")
    _scatter_by_bucket(right, metrics, 100 * metrics.column("padding_ratio"), medians=True)
    right.set_ylim(bottom=0)
    _finish(right, title="padding (line: median of the bucket)", ylabel="padding (% of the step's tokens)")
    return figure


def _scatter_by_bucket(axes: Any, metrics: Metrics, values: NDArray[numpy.float64], *, medians: bool = False) -> None:
    """A dot a step, dark for short and bright for long buckets, with a line at each bucket's median if asked for."""
    iteration, buckets = metrics.column("iteration"), metrics.buckets()
    colours = matplotlib.colormaps["plasma"](numpy.linspace(0.0, 0.82, max(1, len(buckets))))
    for (bucket, where), colour in zip(buckets.items(), colours, strict=False):
        axes.plot(iteration[where], values[where], ".", color=colour, alpha=0.65, markersize=6, label=f"{bucket:,}")
        if medians and math.isfinite(median := _median(values[where])):
            axes.axhline(median, color=colour, linewidth=1, alpha=0.7)


def _finish(axes: Any, *, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    """Labels, a light grid, and the legend between title and axes, where it covers no data."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=28 if handles else 8)
    if handles:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=6,
            frameon=False,
            fontsize=9.5,
            handlelength=1.0,
            handletextpad=0.4,
            columnspacing=1.1,
            borderaxespad=0.1,
        )


def _smooth(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Centred running mean over a fiftieth of the run (5 steps at least), NaN left out."""
    window = max(5, len(values) // 50) | 1
    kernel = numpy.ones(window)
    finite = numpy.isfinite(values)
    # "full" and a cut, as "same" would give an array as long as the kernel where the run is shorter than that
    cut = slice(window // 2, window // 2 + len(values))
    total = numpy.convolve(numpy.where(finite, values, 0.0), kernel)[cut]
    count = numpy.convolve(finite.astype(float), kernel)[cut]
    return numpy.where(count > 0.5, total / numpy.maximum(count, 1.0), numpy.nan)


def _own_sections(
    summary: Mapping[str, Any], run_dir: Path, timings: Mapping[str, float] | None
) -> list[ReportSection]:
    """Summary, phases and the list of files, as sections of the page."""
    sections = [ReportSection("Summary", rows=[("what", "value"), *_summary_rows(summary)])]
    if timings:
        rows = [(phase, f"{seconds:.1f}") for phase, seconds in timings.items()]
        sections.append(ReportSection("Phases", rows=[("phase", "seconds"), *rows]))
    there = [(str(run_dir / name), what) for name, what in WHAT_LIES_WHERE.items() if (run_dir / name).exists()]
    sections.append(ReportSection("Where everything lies", rows=[("path", "what"), *there]))
    return sections


def _summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
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
        ("steps", f"{summary['last_iteration']:,} of {summary['train_iters']:,}, {summary['skipped_steps']} skipped"),
        ("loss, first step", _shown(summary["first_loss"], "{:.4f}")),
        ("loss, mean of the last 10 steps", _shown(summary["last_loss"], "{:.4f}")),
    ]
    for source, loss in summary["last_loss_by_source"].items():
        rows.append((f"loss on {source}, last 10 steps", _shown(loss, "{:.4f}")))
    rows.append(("tokens consumed", _shown(summary["consumed_tokens"], "{:,.0f}")))
    for bucket, speed in summary["median_tokens_per_second_by_bucket"].items():
        rows.append((f"median tokens/s, bucket {bucket:,}", _shown(speed, "{:,.0f}")))
    rows += [
        (
            "median MFU (on a CPU: of the matrix-product rate measured at start)",
            _shown(summary["median_mfu"], "{:.1%}"),
        ),
        ("seconds in steps", _shown(summary["step_seconds"], "{:,.1f}")),
        ("of them waiting for data", _shown(summary["data_wait_share"], "{:.1%}")),
        ("padding, mean of the steps", _shown(summary["padding_ratio"], "{:.1%}")),
    ]
    return rows + [(key.replace("_", " "), str(value)) for key, value in environment.items()]


def _section_html(section: ReportSection) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.statements:
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in section.statements) + "</ul>")
    if section.rows:
        head, *body = [[html.escape(cell) for cell in row] for row in section.rows]
        rows = ["".join(f"<th>{cell}</th>" for cell in head)]
        rows += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
        parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>")
    if section.text:
        parts.append(f"<pre>{html.escape(section.text)}</pre>")
    return "<section>" + "".join(parts) + "</section>"


STYLE = """
:root { color-scheme: light dark; --text: #1d232a; --page: #fbfbfa; --line: #d8dbe0; --soft: #eef0f3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --page: #16191d; --line: #3a4048; --soft: #22272d; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; font: 16px/1.5 system-ui, sans-serif;
       color: var(--text); background: var(--page); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25rem .9rem .25rem .4rem; border-bottom: 1px solid var(--line);
         vertical-align: top; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { background: var(--soft); } td:first-child { min-width: 15rem; }
figure { margin: 1.5rem 0; } figcaption { margin-top: .3rem; }
img { max-width: 100%; border-radius: 6px; background: #fff; }
pre { padding: .8rem; background: var(--soft); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def _page(name: str, *, parts: Sequence[str], pictures: Sequence[tuple[bytes, str]]) -> str:
    """The whole page: the first part (the summary), the pictures, the other parts."""
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(image).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for image, caption in pictures
    )
    title = html.escape(f"Report of {name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>{parts[0]}<h2>Pictures</h2>{figures}{''.join(parts[1:])}</body></html>\n"
    )


def _read_environment(path: Path) -> dict[str, Any]:
    """What the run noted of its machine; empty where it has noted nothing."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}; delete it, and the report leaves the machine out") from None
    return values if isinstance(values, dict) else {}


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".tmp-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error}; free space or make the folder writable") from error


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _mean(values: NDArray[numpy.float64]) -> float:
    finite = values[numpy.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _median(values: NDArray[numpy.float64]) -> float:
    finite = values[numpy.isfinite(values)]
    return float(numpy.median(finite)) if len(finite) else math.nan


def _last(values: NDArray[numpy.float64]) -> float:
    finite = values[numpy.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def _ratio(part: NDArray[numpy.float64], whole: NDArray[numpy.float64]) -> float:
    total = float(numpy.nansum(whole))
    return float(numpy.nansum(part)) / total if total > 0 else math.nan


def _shown(value: float | None, pattern: str) -> str:
    return pattern.format(value) if value is not None and math.isfinite(value) else "not recorded"


def _short(value: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _cycle(colours: Sequence[str]) -> list[str]:
    return list(colours) * 20


def _without_nan(value: Any) -> Any:
    """NaN has no place in JSON: null instead."""
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
