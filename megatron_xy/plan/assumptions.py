"""What the planner takes as given, from `assumptions.yaml` beside this file: each value there has its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_xy.errors import UsageError
from megatron_xy.flops import PEAK_BF16_FLOPS

FILE = Path(__file__).with_name("assumptions.yaml")


@dataclass(frozen=True)
class Device:
    """One GPU; rates a second, bandwidths in bytes and one way."""

    name: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True)
class Efficiencies:
    """Parts of a peak that are reached; of tensor parallel communication, the part that computation does not hide."""

    matmul: float
    attention: float
    memory: float
    node_network: float
    network: float
    exposed_tensor_parallel: float


def device(name: str) -> Device:
    """The device that `--gpu` names. Raises UsageError with the names that there are."""
    known = _file()["devices"]
    if name.lower() not in known:
        raise UsageError(f"--gpu ({name}) is not known; the planner knows {', '.join(known)}")
    entry = known[name.lower()]
    values = {key: float(leaf["value"]) for key, leaf in entry.items() if key != "name"}
    return Device(entry["name"], peak_flops=PEAK_BF16_FLOPS[entry["name"]], **values)


def efficiencies() -> Efficiencies:
    """Those of the file."""
    return Efficiencies(**section("efficiencies"))


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of GPU, and what of its peaks is reached."""

    gpu: Device
    rates: Efficiencies = field(default_factory=efficiencies)
    gpus_per_node: int = 8
    num_nodes: int = 1

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.num_nodes * self.gpus_per_node

    def link(self, *, num_ranks: int) -> float:
        """Bytes a second, one way, between ranks that stand side by side: within a node where they fit into one."""
        if num_ranks <= self.gpus_per_node:
            return self.gpu.node_bandwidth * self.rates.node_network
        return self.gpu.network_bandwidth * self.rates.network


def section(name: str) -> dict[Any, float]:
    """{name: value} of a section of single values."""
    return {key: float(leaf["value"]) for key, leaf in _file()[name].items()}


@cache
def _file() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return values
