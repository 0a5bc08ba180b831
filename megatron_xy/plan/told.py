"""A plan as tables for the terminal: what it is, whether it fits, how long it takes, what stops cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_xy.config import RunConfig
from megatron_xy.plan.calibrate import Calibration
from megatron_xy.plan.memory import RECOMPUTATIONS
from megatron_xy.plan.overview import Plan, RolePlan
from megatron_xy.plan.ppo import TimeLine
from megatron_xy.plan.search import changes
from megatron_xy.ppo.placement import spelt_ranks

GB = 1e9
UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
MOST_LAYOUTS, MOST_PLACEMENTS = 10, 5  # in a table
NO_LAYOUT = "no layout of these ranks fits; take more nodes, or a smaller micro_batch_tokens"


def tables(plan: Plan) -> Iterator[RenderableType]:
    """In the order in which they are read."""
    yield _headline(plan)
    yield _placement(plan)
    yield _memory(plan)
    yield _speed(plan)
    if plan.time_line is not None:
        yield _time_line(plan, plan.time_line)
    yield _costs(plan)
    if plan.quantising:
        yield _quantising(plan)


def layouts(given: RunConfig, found: Sequence[Plan]) -> Iterator[RenderableType]:
    """The layouts of a search; what each changes, as overrides."""
    if not found:
        yield Text(NO_LAYOUT, style="red")
        return
    table = _table(
        f"{len(found)} layouts fit; the fastest",
        "layout", "recompute", "GB", "tokens/s/GPU", "MFU", "days", "overrides",
    )  # fmt: skip
    for other in found[:MOST_LAYOUTS]:
        table.add_row(
            _sizes(other.roles[0]),
            other.config.model.recompute_granularity,
            f"{other.worst_bytes / GB:.0f}",
            f"{other.tokens_per_second:,.0f}",
            f"{100 * other.mfu:.1f} %",
            "" if other.days is None else f"{other.days:,.1f}",
            " ".join(changes(given, other.config)) or "as configured",
        )
    yield table


def placements(given: RunConfig, found: Sequence[Plan]) -> Iterator[RenderableType]:
    """Of PPO's roles, one for each way to share ranks; and the fastest one as overrides."""
    if not found:
        yield Text(NO_LAYOUT, style="red")
        return
    table = _table(
        f"{len(found)} ways to share ranks fit, each at its best",
        "step s", "MFU", "GB", "days", "role", "ranks", "layout", "recompute",
    )  # fmt: skip
    for other in found[:MOST_PLACEMENTS]:
        days = "" if other.days is None else f"{other.days:,.2f}"
        told = (f"{other.step_seconds:.1f}", f"{100 * other.mfu:.1f} %", f"{other.worst_bytes / GB:.0f}", days)
        for number, role in enumerate(other.roles):
            job = role.job
            table.add_row(
                *(told if number == 0 else ("",) * 4),
                job.role,
                spelt_ranks(job.ranks),
                _sizes(role),
                job.model.recompute_granularity if job.is_trained else "",
            )
        table.add_section()
    yield table
    overrides = changes(given, found[0].config)
    yield Text("the fastest, as overrides:\n" + "\n".join(f"  {line}" for line in overrides or ["none: as configured"]))


def remedies(plan: Plan, found: Sequence[Plan]) -> RenderableType:
    """What would make a plan fit."""
    if not found:
        return Text(NO_LAYOUT, style="red")
    lines = [
        f"  {' '.join(changes(plan.config, other.config))}: {other.worst_bytes / GB:.0f} GB, "
        f"{other.tokens_per_second:,.0f} tokens/s/GPU"
        for other in found
    ]
    return Text("nearest that would fit:\n" + "\n".join(lines))


def calibrated(calibration: Calibration) -> RenderableType:
    """Predicted against measured tokens/s a GPU, before and after the fit."""
    title = f"efficiencies x {calibration.factor:.3g}, fitted to the run; tokens/s/GPU"
    table = _table(title, "bucket", "steps", "measured", "predicted before", "predicted", "off by")
    for speed in calibration.speeds:
        values = (speed.measured, speed.before, speed.predicted)
        off = speed.predicted / speed.measured - 1
        table.add_row(
            str(speed.bucket), str(speed.num_steps), *(f"{value:,.0f}" for value in values), f"{100 * off:+.1f} %"
        )
    return table


def _headline(plan: Plan) -> RenderableType:
    cluster, text = plan.cluster, Text()
    text.append(f"task {plan.config.task} on {cluster.num_nodes} nodes x {cluster.gpus_per_node} {cluster.gpu.name}: ")
    text.append(*("fits", "green") if plan.fits else ("does NOT fit", "bold red"))
    text.append(
        f"; rank {plan.worst_rank} holds most, {plan.worst_bytes / GB:.1f} of {cluster.gpu.memory_bytes / GB:.1f} GB "
        f"({plan.margin_bytes / GB:.1f} of it for fragmentation and CUDA itself, which the table leaves out)"
    )
    return text


def _placement(plan: Plan) -> RenderableType:
    table = _table("ranks", "role", "stage", "layers", "ranks", "layout", "parameters a rank")
    for role in plan.roles:
        for memory in role.stages:
            table.add_row(
                role.job.role if memory.stage == 0 else "",
                str(memory.stage),
                _bar(memory.num_layers, role),
                spelt_ranks(role.ranks_of(memory.stage)),
                _layout(role) if memory.stage == 0 else "",
                f"{memory.parameters / 1e6:,.1f} M",
            )
    return table


def _bar(num_layers: int, role: RolePlan) -> str:
    most = max(memory.num_layers for memory in role.stages)
    return f"{num_layers:>3} " + "█" * max(1, round(12 * num_layers / most))


def _layout(role: RolePlan) -> str:
    return (
        f"{_sizes(role)}; {role.job.num_micro_batches} micro-batches of {role.job.micro_batch_tokens}; "
        f"vocabulary padded to {role.padded_vocab_size:,}"
    )


def _sizes(role: RolePlan) -> str:
    parallel = role.job.parallel
    chunks = f" (vp {parallel.num_chunks})" if parallel.num_chunks > 1 else ""
    sizes = f"tp {parallel.tensor_model_parallel_size} x pp {parallel.pipeline_model_parallel_size}{chunks}"
    return f"{sizes} x dp {role.job.dp_size}"


def _memory(plan: Plan) -> RenderableType:
    headings = (
        "role", "stage", "weights", "gradients", "optimizer", "activations", "of micro-batches", "buffers",
        *(["generation"] if plan.time_line else []), "total", *(f"if {mode}" for mode in RECOMPUTATIONS),
    )  # fmt: skip
    largest = max(role.worst.total for role in plan.roles)
    unit, name = (GB, "GB") if largest >= GB else (1e6, "MB")
    table = _table(f"memory a rank, {name} (recompute: " + plan.config.model.recompute_granularity + ")", *headings)
    for role in plan.roles:
        for memory in role.stages:
            values = (memory.weights, memory.gradients, memory.optimizer, memory.kept + memory.working)
            table.add_row(
                role.job.role if memory.stage == 0 else "",
                str(memory.stage),
                *(f"{value / unit:.1f}" for value in values),
                f"{memory.in_flight:.1f}",
                f"{memory.buffers / unit:.2f}",
                *([f"{memory.cache / unit:.1f}"] if plan.time_line else []),
                f"{memory.total / unit:.1f}",
                *(f"{total / unit:.1f}" for total in role.totals_of(memory.stage).values()),
                style="bold" if memory is role.worst else "",
            )
    copies = {of: f"{_number(value)}B" for of, value in plan.host_copy_bytes.items()}
    table.caption = f"of the hosts' memory, copies of checkpoints take {copies['rank']} a rank, {copies['node']} a node"
    return table


def _speed(plan: Plan) -> RenderableType:
    table = _table(
        "speed: parts of a step in %",
        "role", "bucket", "share", "step", "matmul", "attention", "other", "tp", "bubble", "pp", "dp", "update",
        "tokens/s/GPU", "MFU", "HFU",
    )  # fmt: skip
    for role in plan.roles:
        if not role.job.is_trained:
            continue
        for step in role.steps:
            parts = [step.matmul, step.attention, step.elementwise, step.tensor_parallel]
            parts += [step.bubble, step.pipeline, step.data_parallel, step.optimizer]
            table.add_row(
                role.job.role,
                str(step.bucket),
                f"{100 * plan.bucket_shares[step.bucket]:.0f} %",
                _seconds(step.seconds),
                *(f"{100 * part / step.seconds:.1f}" for part in parts),
                f"{step.tokens_per_second:,.0f}",
                f"{100 * step.mfu:.1f}",
                f"{100 * step.hfu:.1f}",
            )
    return table


def _whole_run(plan: Plan) -> str:
    if plan.num_tokens is None or plan.days is None:
        return (
            f"{plan.config.training.epochs} epoch(s) of the data: give their tokens (--tokens 162M, say) for its time"
        )
    gpu_hours = plan.days * 24 * plan.cluster.world_size
    with_stops = _duration(plan.days / plan.reliability.ettr)
    return (
        f"{_number(plan.num_tokens)} tokens: {_duration(plan.days)}, "
        f"{gpu_hours:,.{0 if gpu_hours >= 10 else 1}f} GPU hours; {with_stops} with stops"
    )


def _costs(plan: Plan) -> RenderableType:
    kept, sent = plan.reliability, plan.roles[0].traffic
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_row(
        "whole step" if plan.time_line else "mix of buckets",
        f"{plan.tokens_per_second:,.0f} tokens/s/GPU, MFU {100 * plan.mfu:.1f} %, {_seconds(plan.step_seconds)} a step",
    )
    table.add_row("whole run", _whole_run(plan))
    table.add_row(
        "sent a step and rank",
        f"tp {_number(sent.tensor_parallel)}B, pp {_number(sent.pipeline)}B, dp {_number(sent.data_parallel)}B",
    )
    table.add_row(
        "checkpoint",
        f"{_number(kept.checkpoint_bytes)}B in {_seconds(kept.write_seconds)}; "
        f"training waits {_seconds(kept.stall_seconds)}",
    )
    table.add_row(
        "stops",
        f"every {kept.between_stops_seconds / 3600:,.0f} h; best save_interval {kept.best_save_interval} "
        f"({kept.best_interval_seconds / 60:.0f} min): ETTR {100 * kept.ettr:.2f} %, as configured "
        f"({plan.config.checkpoint.save_interval}) {100 * kept.ettr_as_configured:.2f} %",
    )
    return table


def _quantising(plan: Plan) -> RenderableType:
    title = f"quantize: int8, nf4 on a CPU core, else one {plan.cluster.gpu.name}"
    table = _table(title, "scheme", "result GB", "disk GB", "memory GB", "GPU GB", "hours")
    for form in plan.quantising:
        table.add_row(
            form.scheme,
            *(f"{value / GB:,.1f}" for value in (form.result_bytes, form.disk_bytes, form.host_bytes, form.gpu_bytes)),
            f"{form.hours:,.1f}",
        )
    return table


def _time_line(plan: Plan, line: TimeLine) -> RenderableType:
    table = _table(
        f"a PPO step: {line.seconds:.0f} s", "role", *(f"{phase} s" for phase in line.phases), "idle", "layout"
    )
    whole = max(line.seconds, 1e-9)
    for role, work in line.work.items():
        bar = ""
        for phase, seconds in line.phases.items():
            cells = round(50 * seconds / whole)
            busy = round(50 * work[phase] / whole)
            bar += "█" * min(busy, cells) + "·" * max(0, cells - busy)
        table.add_row(role, *(f"{s:.1f}" for s in work.values()), f"{100 * line.idle_shares[role]:.0f} %", bar)
    if plan.best_split is not None:
        nodes = ", ".join(f"{role} {number}" for role, number in plan.best_split.nodes.items())
        table.caption = f"best split of {plan.cluster.num_nodes} nodes: {nodes}; {plan.best_split.seconds:.0f} s a step"
    return table


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    if days >= 1 / 24:
        return f"{24 * days:.1f} hours"
    minutes = 24 * 60 * days
    return f"{minutes:.1f} minutes" if minutes >= 1 else _seconds(60 * minutes)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _number(value: float) -> str:
    """Of tokens or bytes: 302 G, 4.81 M."""
    unit = next((unit for unit in ("T", "G", "M", "k") if value >= UNITS[unit]), None)
    return f"{value:.0f} " if unit is None else f"{value / UNITS[unit]:.3g} {unit}"


def _table(title: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for heading in headings:
        is_text = heading in ("role", "scheme", "layout", "ranks", "layers", "recompute", "overrides")
        table.add_column(heading, justify="left" if is_text else "right")
    return table
