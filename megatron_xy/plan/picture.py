"""A plan as a picture: above, which ranks hold which role and stage; below, the memory of a rank of each stage."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_xy.plan.overview import Plan
from megatron_xy.report.axes import colour_of
from megatron_xy.storage import storage_errors

GB = 1e9
PARTS = ("weights", "gradients", "optimizer", "kept", "working", "buffers")


def draw_plan(plan: Plan) -> Figure:
    """One row a role over the world's ranks, one bar a stage."""
    figure = Figure(figsize=(11, 3.5 + 0.45 * sum(len(role.stages) for role in plan.roles)), layout="constrained")
    above, below = figure.subplots(
        2, 1, height_ratios=[1 + len(plan.roles), 2 + sum(len(r.stages) for r in plan.roles)]
    )
    for row, role in enumerate(plan.roles):
        for memory in role.stages:
            for rank in role.ranks_of(memory.stage):
                above.add_patch(Rectangle((rank, row + 0.1), 1, 0.8, color=colour_of(memory.stage), linewidth=0))
    cluster = plan.cluster
    above.set_xlim(0, cluster.world_size)
    above.set_ylim(len(plan.roles), 0)
    above.set_yticks([row + 0.5 for row in range(len(plan.roles))], [role.job.role for role in plan.roles])
    above.set_xlabel(f"rank ({cluster.num_nodes} nodes of {cluster.gpus_per_node}); a colour a pipeline stage")
    stages = [(role, memory) for role in plan.roles for memory in role.stages]
    for number, (_, memory) in enumerate(stages):
        left = 0.0
        for index, part in enumerate(PARTS):
            value = getattr(memory, part) / GB
            label = part if number == 0 else None
            below.barh(number, value, left=left, color=colour_of(index), label=label)
            left += value
    below.axvline(cluster.gpu.memory_bytes / GB, color="black", linestyle="--", label=cluster.gpu.name)
    below.set_yticks(range(len(stages)), [f"{role.job.role} stage {memory.stage}" for role, memory in stages])
    below.invert_yaxis()
    below.set_xlabel("memory of a rank at the peak of a step (GB), margin not drawn")
    below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=7, frameon=False)
    return figure


def save_picture(plan: Plan, path: Path) -> None:
    """Writes a PNG, PDF or SVG file. Raises StorageError."""
    figure = draw_plan(plan)
    with storage_errors(path):
        figure.savefig(path, dpi=150)
