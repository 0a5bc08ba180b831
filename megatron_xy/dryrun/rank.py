"""One role on one rank, and a step of it under a ledger: what it holds at the peaks and what it sends.

Nothing of model, schedule or optimizer is modelled here: whoever builds the role, and takes the step, does it by the
job's own code.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_xy import device
from megatron_xy.dryrun.ledger import Ledger, Traffic, as_kernel, storage_bytes
from megatron_xy.optimizer import torch_optimizers
from megatron_xy.parallel import Groups
from megatron_xy.role import Role

Step = Callable[[Callable[[], None]], object]  # of what it is to call right before weights change, if they do


@dataclass(frozen=True)
class Collective:
    """What a rank does of one kind in one group in a step; bytes: of the whole tensors (see Traffic)."""

    kind: str
    group: str
    group_size: int
    calls: int
    bytes: int


@dataclass(frozen=True)
class RankFindings:
    """One role on one rank: what it holds, and what a step of it takes. All sizes in bytes of the device."""

    rank: int
    role: str
    tp_rank: int
    pp_rank: int
    dp_rank: int
    num_layers: int
    num_micro_batches: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # at the peak of forward and backward passes, all that is not of the three above
    update: int  # likewise in the optimizer's update
    beside: int  # of other roles on the same rank
    cache: int  # of ppo's actor in a generation: keys and values, at the most that they take while they grow
    peak: int  # of all of it
    collectives: list[Collective]
    seconds: float


@contextlib.contextmanager
def pretended_rank(rank: int, *, world_size: int) -> Iterator[Ledger]:
    """Inside, this process is `rank` of a world whose others are not there; the ledger notes what it makes and sends.

    Compiled functions are kernels of the ledger.
    """
    ledger = Ledger(device.current())
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    compile_ = torch.compile
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.compile = as_kernel  # type: ignore[assignment]
    try:
        with _pretended_world(rank=rank, world_size=world_size), ledger:
            yield ledger
    finally:
        torch.compile = compile_
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _pretended_world(*, rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is one rank of a world whose other ranks are not there: collectives end at once, and what
    they would have brought stays as it was."""
    dist.init_process_group(device.backend(), store=FakeStore(), rank=rank, world_size=world_size)
    # Else the end of it looks for a backend of a known name, and says on stderr that there is none.
    distributed_c10d._get_default_group()._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
    try:
        yield
    finally:
        dist.destroy_process_group()


def note_step(role: Role, step: Step, *, num_micro_batches: int, ledger: Ledger, rank: int) -> RankFindings:
    """One step of a role, under an entered `ledger` that has seen it built."""
    began = time.perf_counter()
    parameters = [named.parameter for named in role.named_parameters()]
    weights, gradients = storage_bytes(parameters), storage_bytes(_gradient_buffers(role))
    optimizer_before = storage_bytes(_optimizer_tensors(role))
    beside = ledger.now - weights - gradients - optimizer_before
    ledger.traffic.clear()
    ledger.begin_peak()
    peak_of_passes: list[int] = []

    def passes_are_done() -> None:
        peak_of_passes.append(ledger.peak)
        ledger.begin_peak()

    step(passes_are_done)
    if role.optimizer is None:
        passes_are_done()
    # The moments are made by the first update: every later step's passes have them beside.
    optimizer = storage_bytes(_optimizer_tensors(role))
    passes, update = peak_of_passes[0] + optimizer - optimizer_before, ledger.peak
    static = beside + weights + gradients + optimizer
    groups = role.groups
    layers = {named.name.split(".")[2] for named in role.named_parameters() if named.name.startswith("decoder.layers.")}
    return RankFindings(
        rank=rank,
        role=role.name,
        tp_rank=groups.tp_rank,
        pp_rank=groups.pp_rank,
        dp_rank=groups.dp_rank,
        num_layers=len(layers),
        num_micro_batches=num_micro_batches,
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=passes - static,
        update=update - static if role.optimizer is not None else 0,
        beside=beside,
        cache=0,
        peak=max(passes, update),
        collectives=_collectives(ledger.traffic, groups),
        seconds=time.perf_counter() - began,
    )


def _optimizer_tensors(role: Role) -> list[torch.Tensor]:
    """What the optimizer holds beside the model's own weights: fp32 main weights, moments, step counters."""
    if role.optimizer is None:
        return []
    held: list[torch.Tensor] = []
    own = {parameter.untyped_storage()._cdata for parameter in (named.parameter for named in role.named_parameters())}
    for inner in torch_optimizers(role.optimizer):
        for group in inner.param_groups:
            for main in group["params"]:
                held += [main, *(value for value in inner.state[main].values() if isinstance(value, torch.Tensor))]
    return [tensor for tensor in held if tensor.untyped_storage()._cdata not in own]


def _gradient_buffers(role: Role) -> list[torch.Tensor]:
    chunks: list[Any] = list(role.chunks)
    return [buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _collectives(traffic: Mapping[tuple[str, str], Traffic], groups: Groups) -> list[Collective]:
    """In groups of more than one rank, by the group's short name."""
    collection = groups.collection
    known = {"tp": collection.tp, "dp": collection.dp, "pp": collection.pp, "mp": collection.mp}
    # embd is None between first and last stage; of two stages megatron-core's interleaved schedule takes the world.
    known |= {"embd": collection.embd, "all": groups.all_ranks, "world": dist.group.WORLD}
    names = {group.group_name: (name, group.size()) for name, group in known.items() if group is not None}
    found = [
        Collective(kind, *names[group], calls=noted.calls, bytes=noted.bytes)
        for (kind, group), noted in traffic.items()
        if names[group][1] > 1
    ]
    return sorted(found, key=lambda collective: (collective.group, collective.kind))
