"""The world under torchrun, measured: packages on every rank, bandwidth of all-reduce and of point to point."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_xy import device, parallel
from megatron_xy.doctor.health import Finding

REPEATS = 5
# Bytes/s below which something is wrong. H100 SXM: 900 GB/s of NVLink both ways; between nodes 400 Gb/s a GPU.
EXPECTED_WITHIN_NODE = {"all-reduce": 300e9, "point to point": 200e9}
EXPECTED_BETWEEN_NODES = {"all-reduce": 100e9, "point to point": 20e9}


def same_versions(versions: dict[str, str]) -> Finding:
    """Whether all ranks have the versions of rank 0."""
    worlds = parallel.gathered_values({"host": socket.gethostname(), "versions": versions})
    first = worlds[0]
    for rank, world in enumerate(worlds):
        for name in sorted(first["versions"].keys() | world["versions"].keys()):
            ours, theirs = first["versions"].get(name), world["versions"].get(name)
            if ours != theirs:
                found = f"{name} is {ours} on {first['host']} (rank 0) and {theirs} on {world['host']} (rank {rank})"
                return Finding("fail", "versions on all nodes", found, "install one environment everywhere")
    return Finding("ok", "versions on all nodes", f"the same on {len(worlds)} ranks")


def bandwidth() -> list[Finding]:
    """All-reduce over the world, and rank 0 to the last rank. Collective; every rank gets findings by its own clock."""
    world, rank = dist.get_world_size(), dist.get_rank()
    hosts = len(set(parallel.gathered_values(socket.gethostname())))
    size = 2**25 if device.is_cpu() else 2**30
    tensor = torch.ones(size // 4, device=device.current())

    def send() -> None:
        if rank == 0:
            dist.send(tensor, dst=world - 1)
        elif rank == world - 1:
            dist.recv(tensor, src=0)

    reduced = 2 * (world - 1) / world * size / _seconds(lambda: dist.all_reduce(tensor))
    sent = size / _seconds(send)
    return [_judged("all-reduce", reduced, hosts=hosts), _judged("point to point", sent, hosts=hosts)]


def _judged(name: str, rate: float, *, hosts: int) -> Finding:
    where = f"{rate / 1e9:.2f} GB/s over {device.backend()}, {hosts} host(s)"
    if device.is_cpu():
        return Finding("ok", name, f"{where}; nothing is expected of a CPU")
    expected = (EXPECTED_WITHIN_NODE if hosts == 1 else EXPECTED_BETWEEN_NODES)[name]
    if rate >= expected:
        return Finding("ok", name, f"{where}, expected from {expected / 1e9:.0f}")
    remedy = "look at nvidia-smi topo -m and ibstat, and at the transports that NCCL_DEBUG=INFO tells"
    return Finding("warn", name, f"{where}, expected from {expected / 1e9:.0f}", remedy)


def _seconds(work: Callable[[], Any]) -> float:
    """Of one call, the mean of several after one to warm up; all ranks begin together."""
    work()
    parallel.barrier()
    device.synchronize()
    began = time.monotonic()
    for _ in range(REPEATS):
        work()
    device.synchronize()
    parallel.barrier()
    return (time.monotonic() - began) / REPEATS
