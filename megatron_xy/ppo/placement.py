"""A PPO run's roles on the ranks of the world, in words and as a picture of characters. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_xy.config import PlacedRole, RoleName

COLUMNS = 64  # ranks, or equal groups of neighbours, a line of the picture


def drawn(roles: Mapping[RoleName, PlacedRole], *, world_size: int) -> list[str]:
    """A line a role: where it stands in the world (#: all of these ranks, +: some of them), and how it is split."""
    group = -(-world_size // COLUMNS)
    cells = range(0, world_size, group)
    lines = []
    for name, role in roles.items():
        has = set(role.ranks)
        strip = "".join(
            "#" if all(rank in has for rank in span) else "+" if any(rank in has for rank in span) else "."
            for span in (range(first, min(first + group, world_size)) for first in cells)
        )
        lines.append(f"  {name:<9} {strip}  {layout(role)}, ranks {spelt_ranks(role.ranks)}")
    if group > 1:
        lines.append(f"  {'':<9} a character stands for {group} ranks")
    return lines


def layout(role: PlacedRole) -> str:
    """tp 8 x pp 4 x dp 2"""
    tp, pp = role.parallel.tensor_model_parallel_size, role.parallel.pipeline_model_parallel_size
    return f"tp {tp} x pp {pp} x dp {len(role.ranks) // (tp * pp)}"


def spelt_ranks(ranks: Sequence[int]) -> str:
    """0-3,6 of (0, 1, 2, 3, 6)."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)
