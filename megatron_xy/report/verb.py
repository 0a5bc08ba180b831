"""`megatron-xy report RUN`: from RUN/metrics.jsonl, eval.jsonl, evaluations.jsonl, events.jsonl, run.yaml and env.json
to RUN/report/.

That is PNG files, summary.json and index.html, which holds everything in itself and may be sent around. Without torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from megatron_xy.config import RunConfig, load_config
from megatron_xy.fonts import fonts_for_names
from megatron_xy.record_files import read_records
from megatron_xy.report.benchmarks import draw_benchmarks
from megatron_xy.report.evaluation import draw_evaluation
from megatron_xy.report.mixture import draw_mixture
from megatron_xy.report.page import ReportSection, page
from megatron_xy.report.pictures import draw_data, draw_loss, draw_schedule, draw_throughput, draw_time_and_memory
from megatron_xy.report.ppo import (
    answer_sections,
    draw_losses,
    draw_policy,
    draw_scores,
    draw_time,
    ppo_rows,
    summarise_ppo,
)
from megatron_xy.report.records import Metrics, read_metrics
from megatron_xy.report.reward import draw_pairs, epoch_section, has_epochs
from megatron_xy.report.sections import own_sections
from megatron_xy.report.summary import summarise, summary_rows
from megatron_xy.run_folder.files import read_standing_json
from megatron_xy.storage import storage_errors, without_non_finite, write_bytes


class Picture(NamedTuple):
    """One PNG of a report."""

    draw: Callable[[Metrics], Figure]
    caption: str
    is_there: bool = True  # whether the run has noted what it shows


def make_report(
    run_dir: Path, *, timings: Mapping[str, float] | None = None, sections: Sequence[ReportSection] = ()
) -> Path:
    """Writes RUN/report/ and returns its index.html.

    `timings` are phases and their seconds; `sections` come after the page's own, in order. Raises ConfigError where the
    folder holds no run, DataError where its records are empty or damaged, StorageError where nothing can be written.
    """
    metrics = read_metrics(run_dir / "metrics.jsonl")
    evaluations, events, benchmarks = (
        Metrics(read_records(run_dir / name)) for name in ("eval.jsonl", "events.jsonl", "evaluations.jsonl")
    )
    config = load_config(run_dir / "run.yaml")
    told = read_standing_json(run_dir / "env.json")
    environment = told if isinstance(told, dict) else {}
    if config.task == "ppo":
        summary, rows = summarise_ppo(metrics, config=config, environment=environment), ppo_rows
    else:
        summary = summarise(metrics, config=config, environment=environment, evaluations=evaluations)
        rows = summary_rows
    if timings:
        summary["seconds_by_phase"] = dict(timings)
    folder = run_dir / "report"
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
    images: list[tuple[bytes, str]] = []
    pictures = _pictures(metrics, evaluations=evaluations, config=config)
    pictures["benchmarks"] = Picture(
        partial(draw_benchmarks, evaluations=benchmarks),
        "Benchmarks of the run's checkpoints.",
        is_there=bool(benchmarks.records),
    )
    for name, picture in pictures.items():
        if picture.is_there:
            style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
            with matplotlib.rc_context(style), fonts_for_names():
                images.append((_png(picture.draw(metrics)), picture.caption))
            write_bytes(folder / f"{name}.png", images[-1][0])
        else:
            with storage_errors(folder / f"{name}.png"):
                (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    write_bytes(folder / "summary.json", (json.dumps(without_non_finite(summary), indent=2) + "\n").encode())
    if config.task == "ppo":
        sections = [*answer_sections(read_records(run_dir / "samples.jsonl")), *sections]
    if config.task == "reward" and has_epochs(evaluations):
        sections = [epoch_section(run_dir), *sections]
    own = own_sections(summary, rows(summary), events=events, run_dir=run_dir, timings=timings)
    write_bytes(folder / "index.html", page(run_dir.name, sections=[*own, *sections], pictures=images).encode())
    return folder / "index.html"


def _pictures(metrics: Metrics, *, evaluations: Metrics, config: RunConfig) -> dict[str, Picture]:
    """By the names of their files, in the page's order."""
    if config.task == "ppo":
        return {
            "scores": Picture(draw_scores, "Scores of the answers, and what they cost in divergence."),
            "policy": Picture(draw_policy, "The policy: how far it went, how sure it is, how long its answers are."),
            "losses": Picture(draw_losses, "What actor and critic learn."),
            "time": Picture(draw_time, "Where a step's time goes, and how long each role waits for the others."),
        }
    return {
        "pairs": Picture(
            partial(draw_pairs, evaluations=evaluations, reward=config.reward_section),
            "How often the better answer wins, what both score, on what scale, and for whom.",
            is_there=config.has_pairs and bool(evaluations.records),
        ),
        "loss": Picture(
            draw_loss,
            "Loss a step; a dot is a step in the colour of its bucket, a line a running mean. Odd steps on top.",
        ),
        "evaluation": Picture(
            partial(draw_evaluation, evaluations=evaluations),
            "Loss on held-out data beside the training's: in all, by bucket, by source, by position in the document.",
            is_there=not config.has_pairs and bool(evaluations.records),
        ),
        "learning_rate_and_grad_norm": Picture(
            draw_schedule, "Learning rate and the gradient's norm before clipping. Odd steps on top."
        ),
        "throughput": Picture(draw_throughput, "Speed of all ranks together, and what a step spends waiting for data."),
        "time_and_memory": Picture(
            draw_time_and_memory,
            "Where the time goes, saves and evaluations included (they stand at the step after), and peak memory.",
            is_there=metrics.holds("seconds_by_phase"),
        ),
        "data": Picture(draw_data, "What was drawn, and how much of it was padding."),
        "mixture": Picture(
            partial(draw_mixture, config=config),
            "Each source's part of all tokens so far beside what data.weights and training.phases ask for; its epochs.",
            is_there=metrics.holds("consumed_share_by_source"),
        ),
    }


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, facecolor="white")
    return image.getvalue()
