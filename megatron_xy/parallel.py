"""Ranks of a role -> process groups, sizes and coordinates; start and end of torch.distributed; the plain collectives.

A process group is a parameter here, never a global: `build_groups` makes them for one role, on every rank of the world
in the same order, and hands each member a `Groups`. megatron-core takes its `collection`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_xy import device, mcore
from megatron_xy.config import ParallelConfig
from megatron_xy.errors import ConfigError, PeerLost
from megatron_xy.runtime import environment
from megatron_xy.runtime.liveness import waiting_for

Dimension = Literal["pp", "dp", "cp", "tp"]
_DIMENSIONS: tuple[Dimension, ...] = ("pp", "dp", "cp", "tp")  # slowest first: tensor parallel ranks are neighbours


@dataclass(frozen=True)
class Groups:
    """The process groups of one role as seen from one of its ranks."""

    name: str
    ranks: tuple[int, ...]  # global ranks, ascending
    collection: mcore.ProcessGroupCollection
    all_ranks: dist.ProcessGroup

    @property
    def tp_size(self) -> int:
        """Tensor parallel ranks."""
        return int(self.collection.tp.size())

    @property
    def tp_rank(self) -> int:
        """This rank's place among them."""
        return int(self.collection.tp.rank())

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return int(self.collection.pp.size())

    @property
    def pp_rank(self) -> int:
        """This rank's stage."""
        return int(self.collection.pp.rank())

    @property
    def dp_size(self) -> int:
        """Replicas of the model."""
        return int(self.collection.dp.size())

    @property
    def dp_rank(self) -> int:
        """This rank's replica."""
        return int(self.collection.dp.rank())

    @property
    def role_rank(self) -> int:
        """This rank's place among all ranks of the role."""
        return int(self.all_ranks.rank())

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and sees the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_leader(self) -> bool:
        """The one rank of the role that speaks and writes for it: the last stage's first, where the loss is."""
        return self.is_last_stage and self.dp_rank == 0 and self.tp_rank == 0


def start_distributed(*, timeout_seconds: float) -> None:
    """Joins torchrun's world; every group's collectives fail after `timeout_seconds` rather than wait for ever."""
    with waiting_for("the other ranks"):
        dist.init_process_group(device.backend(), timeout=datetime.timedelta(seconds=timeout_seconds))


def start_alone() -> None:
    """A world of this one process, for verbs that need a model and no torchrun."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(device.backend(), store=store, rank=0, world_size=1)


def stop_distributed() -> None:
    """Leaves the world after all ranks are done."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def build_groups(name: str, *, ranks: Sequence[int], parallel: ParallelConfig, timeout_seconds: float) -> Groups | None:
    """The groups of a role over `ranks`, ascending. Collective over the world: every rank calls it, role by role.

    Returns None on ranks outside the role. The layout is megatron-core's: tensor parallel ranks are neighbours, then
    context, data and pipeline parallel ranks.
    """
    sizes = (
        parallel.pipeline_model_parallel_size,
        len(ranks) // parallel.model_parallel_size,
        parallel.context_parallel_size,
        parallel.tensor_model_parallel_size,
    )
    assert list(ranks) == sorted(ranks), "a process group's ranks ascend, whatever order it is given them in"
    grid = torch.tensor(list(ranks)).reshape(sizes)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # Nothing travels in a group of one rank, so a rank has one of these, whatever it stands for: each has three threads
    # of gloo's, and with 512 ranks most calls would make such (where all wait, too, under TORCH_DIST_INIT_BARRIER=1).
    singles = {rank: dist.new_group([rank], timeout=timeout, group_desc=name) for rank in ranks}

    def mine_of(groups: list[list[int]]) -> dist.ProcessGroup | None:
        mine = None
        for group_ranks in groups:
            is_single = len(group_ranks) == 1
            group = (
                singles[group_ranks[0]] if is_single else dist.new_group(group_ranks, timeout=timeout, group_desc=name)
            )
            if dist.get_rank() in group_ranks:
                mine = group
        return mine

    pipelines = _along(grid, "pp")
    tp, cp, pp, dp = (mine_of(_along(grid, dimension)) for dimension in ("tp", "cp", "pp", "dp"))
    dp_cp = dp if parallel.context_parallel_size == 1 else mine_of(_along(grid, "dp", "cp"))
    tp_cp = tp if parallel.context_parallel_size == 1 else mine_of(_along(grid, "cp", "tp"))
    mp = mine_of(_along(grid, "pp", "tp"))
    embd = mine_of([sorted({stages[0], stages[-1]}) for stages in pipelines])
    pos_embd = mine_of([[stages[0]] for stages in pipelines])
    alone = singles.get(dist.get_rank())
    all_ranks = mine_of([list(ranks)])
    if all_ranks is None:
        return None
    collection = mcore.ProcessGroupCollection(
        tp=tp, cp=cp, pp=pp, dp=dp, dp_cp=dp_cp, tp_cp=tp_cp, mp=mp, embd=embd, pos_embd=pos_embd,
        intra_dp_cp=dp_cp, intra_dist_opt=all_ranks, inter_dist_opt=None, hcp=None, tp_dp_cp=None,
        # No mixture of experts: expert groups are those of the dense layers, or this rank alone.
        ep=alone, expt_tp=tp, expt_dp=dp, tp_ep=tp, tp_ep_pp=mp, intra_expt_dp=dp,
    )  # fmt: skip
    return Groups(name=name, ranks=tuple(ranks), collection=collection, all_ranks=all_ranks)


def _along(grid: torch.Tensor, *dimensions: Dimension) -> list[list[int]]:
    """Rank lists of the groups whose members differ in `dimensions` only; `grid` is [pp, dp, cp, tp]."""
    vary = [axis for axis, name in enumerate(_DIMENSIONS) if name in dimensions]
    keep = [axis for axis in range(len(_DIMENSIONS)) if axis not in vary]
    lists: list[list[int]] = grid.permute(*keep, *vary).flatten(len(keep)).flatten(0, -2).tolist()
    return lists


@contextlib.contextmanager
def as_default_group(group: dist.ProcessGroup) -> Iterator[None]:
    """Inside, torch's default group is `group`.

    megatron-core builds its optimizer with collectives on the default group, which only this role's ranks reach.
    """
    world = distributed_c10d._get_default_group()
    ranks = distributed_c10d._world.pg_group_ranks[group]
    distributed_c10d._update_default_pg(group)
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(group.size())}
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(world)
        distributed_c10d._world.pg_group_ranks[group] = ranks


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of `tensor` over `group`, in place; the tensor itself."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def max_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Elementwise maximum of `tensor` over `group`, in place; the tensor itself."""
    if group.size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def any_over(is_so: bool, group: dist.ProcessGroup) -> bool:
    """Whether it is so on any rank of `group`, the same answer on all of them."""
    return bool(max_over(torch.tensor([int(is_so)], device=device.current()), group).item())


def gathered_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' tensors of one shape, one above the other, on every rank of `group`: [ranks, ...]."""
    if group.size() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def gathered_values(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's JSON value, on every rank of `group` (of the world, unless given), by rank."""
    group = group or dist.group.WORLD
    assert group is not None, "start_distributed comes before"
    content = json.dumps(value).encode()
    where = device.current()
    sizes = gathered_over(torch.tensor([len(content)], device=where), group)
    room = int(sizes.max().item())
    rows = gathered_over(torch.frombuffer(bytearray(content.ljust(room)), dtype=torch.uint8).to(where), group)
    return [json.loads(bytes(row)) for row in rows.tolist()]


def send_onward(tensor: torch.Tensor, groups: Groups) -> dist.Work:
    """Starts to send a contiguous `tensor` to the next pipeline stage, from the last one to the first.

    It must stay as it is until the returned work is waited for.
    """
    group, peer = _neighbour(groups, groups.pp_rank, groups.pp_rank + 1)
    work = dist.isend(tensor, dst=peer, group=group)
    assert work is not None, "the neighbour is in the group"
    return work


def receive_onward(tensor: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Fills `tensor` with what the stage before sends by `send_onward`, the last one where this is the first."""
    group, peer = _neighbour(groups, groups.pp_rank - 1, groups.pp_rank)
    dist.recv(tensor, src=peer, group=group)
    return tensor


def _neighbour(groups: Groups, sender: int, receiver: int) -> tuple[dist.ProcessGroup, int]:
    """The group that joins two neighbouring stages, and the global rank of the one that is not this rank.

    From last to first it is another group than onward: with two stages both directions would share one channel, and on
    a GPU a queue of their own, in which two sends could wait for each other.
    """
    stages = dist.get_process_group_ranks(groups.collection.pp)
    sender, receiver = sender % len(stages), receiver % len(stages)
    group = groups.collection.embd if receiver == 0 else groups.collection.pp
    return group, stages[receiver if sender == groups.pp_rank else sender]


def broadcast_from_last_stage(tensor: torch.Tensor, groups: Groups) -> dist.Work:
    """Starts to give every rank of this replica the `tensor` of its last stage's first tensor parallel rank."""
    replica = dist.get_process_group_ranks(groups.collection.mp)
    source, group = replica[-groups.tp_size], groups.collection.mp
    work: dist.Work | None = dist.broadcast(tensor, src=source, group=group, async_op=True)
    assert work is not None, "this rank is in the group"
    return work


def from_last_stage(tensor: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The last pipeline stage's `tensor` on every stage, in place; the tensor itself."""
    if groups.pp_size > 1:
        last = dist.get_process_group_ranks(groups.collection.pp)[-1]
        dist.broadcast(tensor, src=last, group=groups.collection.pp)
    return tensor


def barrier(groups: Groups | None = None) -> None:
    """Waits for all ranks of the role; without one, of the world."""
    # NCCL would guess a GPU by the rank's number, and wait for ever where a host has more or fewer ranks than another.
    devices = None if device.is_cpu() else [device.current().index]
    dist.barrier(group=None if groups is None else groups.all_ranks, device_ids=devices)


@contextlib.contextmanager
def errors_told(*, when_memory_runs_out: str) -> Iterator[None]:
    """Says in our words what torch says of a collective that fails and of a device's memory that runs out.

    when_memory_runs_out: what the user can do then. Raises PeerLost or ConfigError.
    """
    try:
        yield
    except RuntimeError as error:
        # The second: CUDA's own words, as NCCL passes them on, which needs memory for every communicator it opens.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            rank = environment.rank()
            raise ConfigError(
                f"rank {rank} ran out of device memory ({_told(error)}); {when_memory_runs_out}"
            ) from error
        lost = as_peer_lost(error)
        if lost is None:
            raise
        raise lost from error


def as_peer_lost(error: BaseException) -> PeerLost | None:
    """`error` as PeerLost where a collective failed or timed out, or this rank's GPU broke; None for anything else."""
    text = str(error)
    if isinstance(error, RuntimeError) and any(mark in text for mark in device.BROKEN_GPU_MARKS):
        return PeerLost(
            f"the GPU of rank {environment.rank()} on {socket.gethostname()} has failed: {_told(error)}; look at dmesg "
            f"(Xid) and nvidia-smi -q there, and leave the host out where that comes again"
        )
    marked = isinstance(error, RuntimeError) and any(mark in text for mark in device.COLLECTIVE_ERROR_MARKS)
    if marked or isinstance(error, dist.DistError):
        return PeerLost(f"a collective failed because another rank is gone or stands still: {_told(error)}")
    return None


def _told(error: BaseException) -> str:
    """What torch's `error` says in its first line, and after it what NCCL said last, where that comes along."""
    text = str(error).strip() or type(error).__name__
    first_line = re.sub(r"^\[\S+:\d+\] ", "", text.splitlines()[0])  # gloo begins with the place in its own source
    first_line = first_line.partition(" This is typically caused by")[0]  # and ends with guesses
    last_of_nccl = " ".join(text.partition("Last error:")[2].split())
    return f"{first_line}: {last_of_nccl}" if last_of_nccl else first_line
