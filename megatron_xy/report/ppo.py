"""What a PPO run's report shows: scores, divergence, losses, answers, what each role idles; signs of reward hacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.figure import Figure

from megatron_xy.config import RunConfig
from megatron_xy.report.axes import COLOURS, colour_of, finish, two_panels
from megatron_xy.report.numbers import last, mean, number, shown, smooth
from megatron_xy.report.page import ReportSection
from megatron_xy.report.records import Metrics

FIRST_AND_LAST = 10  # steps whose means are compared
LENGTH_GROWTH, MOST_KL = 1.5, 20.0  # beyond: answers grow longer; nats an answer in which the policy runs away
MOST_DEVIATIONS = 6.0  # of the first answers' scores, by which a mean score may rise


def draw_scores(metrics: Metrics) -> Figure:
    """Left: the score over the run; right: score against divergence, from dark to bright as the run goes."""
    figure, left, right = two_panels()
    iteration, score, spread = (metrics.column(name) for name in ("iteration", "score_mean", "score_std"))
    left.fill_between(iteration, score - spread, score + spread, color=COLOURS[0], alpha=0.15, label="one deviation")
    left.plot(iteration, score, ".", color=COLOURS[0], alpha=0.4, markersize=5, label="step")
    left.plot(iteration, smooth(score), color="black", linewidth=1.8, label="running mean")
    finish(left, title="score", ylabel="score, mean of the step's answers")
    right.scatter(metrics.column("kl"), score, c=iteration, cmap="plasma", s=14)
    finish(right, title="score against divergence (bright: later)", ylabel="score", xlabel="KL, nats an answer")
    return figure


def draw_policy(metrics: Metrics) -> Figure:
    """Divergence and its coefficient; entropy; the first ratio; lengths and how many answers end."""
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    (upper_left, upper_right), (lower_left, lower_right) = figure.subplots(2, 2)
    iteration = metrics.column("iteration")
    upper_left.plot(iteration, metrics.column("kl"), color=COLOURS[0], linewidth=1.6, label="KL to the reference")
    finish(upper_left, title="divergence", ylabel="nats an answer")
    upper_right.plot(iteration, metrics.column("entropy"), color=COLOURS[2], linewidth=1.6)
    finish(upper_right, title="entropy", ylabel="nats a token")
    lower_left.plot(iteration, metrics.column("response_length_mean"), color=COLOURS[1], linewidth=1.6, label="length")
    lower_left.set_ylim(bottom=0)
    finish(lower_left, title="answers", ylabel="tokens, mean")
    lower_right.plot(iteration, metrics.column("end_rate"), color=COLOURS[3], linewidth=1.6, label="ended by itself")
    lower_right.plot(iteration, metrics.column("clip_fraction"), color=COLOURS[4], linewidth=1.2, label="ratio clipped")
    lower_right.plot(
        iteration, metrics.column("value_clip_fraction"), color=COLOURS[5], linewidth=1.2, label="value clipped"
    )
    lower_right.set_ylim(0, 1.02)
    finish(lower_right, title="shares", ylabel="share")
    return figure


def draw_losses(metrics: Metrics) -> Figure:
    """Left: losses of actor and critic; right: their gradient norms."""
    figure, left, right = two_panels()
    iteration = metrics.column("iteration")
    for index, role in enumerate(("actor", "critic")):
        left.plot(iteration, metrics.column(f"{role}_loss"), color=colour_of(index), linewidth=1.4, label=role)
        right.plot(iteration, metrics.column(f"{role}_grad_norm"), color=colour_of(index), linewidth=1.4, label=role)
    right.set_yscale("log")
    finish(left, title="losses", ylabel="loss")
    finish(right, title="gradient norms", ylabel="norm before clipping (log scale)")
    return figure


def draw_time(metrics: Metrics) -> Figure:
    """Left: seconds by phase; right: the share of its ranks' time that each role idles."""
    figure, left, right = two_panels()
    iteration = metrics.column("iteration")
    bottom = numpy.zeros(len(iteration))
    for index, (phase, seconds) in enumerate(metrics.parts("seconds_by_phase").items()):
        height = numpy.nan_to_num(seconds)
        left.fill_between(iteration, bottom, bottom + height, color=colour_of(index), alpha=0.8, label=phase)
        bottom = bottom + height
    left.set_ylim(bottom=0)
    finish(left, title="seconds by phase", ylabel="seconds a step")
    for index, (role, share) in enumerate(metrics.parts("idle_share_by_role").items()):
        right.plot(iteration, 100 * smooth(share), color=colour_of(index), linewidth=1.4, label=role)
    right.set_ylim(0, 100)
    finish(right, title="idle: the price of separate groups (running mean)", ylabel="% of the role's time")
    return figure


def summarise_ppo(metrics: Metrics, *, config: RunConfig, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The run in a few numbers, by name; first and last are means of up to 10 steps."""
    told: dict[str, Any] = {
        "task": config.task,
        "environment": {key: value for key, value in environment.items() if isinstance(value, str | int | float)},
        "last_iteration": int(metrics.column("iteration")[-1]),
        "train_iters": config.training.train_iters,
        "consumed_samples": last(metrics.column("consumed_samples")),
        "consumed_tokens": last(metrics.column("consumed_tokens")),
        "step_seconds": float(numpy.nansum(metrics.column("step_seconds"))),
        **{
            name: {part: mean(values) for part, values in metrics.parts(name).items()}
            for name in ("seconds_by_role", "idle_share_by_role", "tokens_per_second_by_phase")
        },
    }
    for name in ("score_mean", "score_std", "kl", "entropy", "response_length_mean", "end_rate", "critic_loss"):
        values = metrics.column(name)
        told[f"first_{name}"], told[f"last_{name}"] = mean(values[:FIRST_AND_LAST]), mean(values[-FIRST_AND_LAST:])
    told["signs_of_reward_hacking"] = _signs(told)
    return told


def _signs(told: Mapping[str, Any]) -> list[str]:
    """What a rising score alone would hide."""
    signs = []
    first, now = told["first_response_length_mean"], told["last_response_length_mean"]
    if now > LENGTH_GROWTH * first:
        signs.append(f"answers grew from {first:.1f} to {now:.1f} tokens")
    if told["last_kl"] > MOST_KL:
        signs.append(f"the policy is {told['last_kl']:.1f} nats an answer away from the reference")
    deviation = told["first_score_std"]
    if deviation and (rise := told["last_score_mean"] - told["first_score_mean"]) > MOST_DEVIATIONS * deviation:
        signs.append(
            f"the score rose by {rise / deviation:.1f} deviations of the first answers' scores: few answers that good, "
            f"if any, were there for the reward model to learn from"
        )
    if told["last_end_rate"] < 0.5 * told["first_end_rate"]:
        signs.append(f"answers that end by themselves fell from {told['first_end_rate']:.0%} to "
                     f"{told['last_end_rate']:.0%}")  # fmt: skip
    return signs


def answer_sections(samples: Sequence[Mapping[str, Any]]) -> list[ReportSection]:
    """The best and the worst answer of the first and of the last step, as rows of samples.jsonl."""
    sections = []
    for title, iterations in (("first", samples[:1]), ("last", samples[-1:])):
        for iteration in (row["iteration"] for row in iterations):
            lines = [
                f"{row['prompt']}\n{row['kind']}, score {row['score']:+.4f}, {row['num_tokens']} tokens"
                f"{'' if row['has_ended'] else ', cut'}: {row['response']}"
                for row in samples
                if row["iteration"] == iteration
            ]
            sections.append(ReportSection(f"Answers of the {title} step", text="\n\n".join(lines)))
    return sections


def ppo_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) as they stand on the page."""
    rows = [
        ("task", summary["task"]),
        ("steps", f"{summary['last_iteration']:,} of {summary['train_iters']:,}"),
        ("answers", shown(summary["consumed_samples"], "{:,.0f}")),
    ]
    for name, title in (
        ("score_mean", "score"), ("kl", "KL to the reference, nats an answer"), ("entropy", "entropy, nats a token"),
        ("response_length_mean", "tokens an answer"), ("end_rate", "answers that ended by themselves"),
        ("critic_loss", "critic loss"),
    ):  # fmt: skip
        first, now = (shown(number(summary[f"{when}_{name}"]), "{:.4f}") for when in ("first", "last"))
        rows.append((f"{title}, first and last {FIRST_AND_LAST} steps", f"{first} -> {now}"))
    rows.append(("signs of reward hacking", "; ".join(summary["signs_of_reward_hacking"]) or "none seen"))
    for role, share in summary["idle_share_by_role"].items():
        worked = shown(number(summary["seconds_by_role"].get(role)), "{:.3f}")
        rows.append((f"the {role}: idle share, seconds of work a step", f"{shown(number(share), '{:.0%}')}, {worked}"))
    for phase, speed in summary["tokens_per_second_by_phase"].items():
        rows.append((f"tokens/s of phase {phase}, mean", shown(number(speed), "{:,.0f}")))
    rows.append(("seconds in steps", shown(summary["step_seconds"], "{:,.1f}")))
    return rows + [(key.replace("_", " "), str(value)) for key, value in summary["environment"].items()]
