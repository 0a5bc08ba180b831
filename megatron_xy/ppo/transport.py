"""How results travel between roles' ranks: shipments of rows that one rank has, made whole on every rank.

A role's method computes on the role's ranks only and hands back a shipment: tensors of one shape on all ranks, each
element filled in by exactly one rank and 0 on the others. `exchange` adds them up over the world: from every rank to
every rank at once, through no single process, and exact, since adding zeros is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class Shipment:
    """Named tensors of one shape on all ranks, in the same order; what another rank fills in is 0 here."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def exchange(*shipments: Shipment) -> list[dict[str, torch.Tensor]]:
    """Every shipment's tensors, whole, on every rank. Collective over the world: all ranks name the same shipments.

    One all-reduce for each dtype, however many tensors there are.
    """
    tensors = [tensor for shipment in shipments for tensor in shipment.tensors.values()]
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        _sum_in_place([tensor for tensor in tensors if tensor.dtype == dtype])
    return [shipment.tensors for shipment in shipments]


def _sum_in_place(tensors: Sequence[torch.Tensor]) -> None:
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
