"""One rank of a job, built by the job's own code on tensors without data, and one step of it, noted as it goes.

Nothing of model, schedule or optimizer is modelled here: `pretrain.build` and `train_step` are what every rank runs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_xy import device, parallel, pretrain
from megatron_xy.config import RunConfig
from megatron_xy.data.dataset import MicroBatch, Sample, collate
from megatron_xy.dryrun.ledger import Ledger, Traffic, as_kernels, storage_bytes
from megatron_xy.optimizer import torch_optimizers
from megatron_xy.parallel import Groups
from megatron_xy.reward.batches import pair_micro_batches
from megatron_xy.reward.objective import reward_objective
from megatron_xy.reward.pairs import Pair
from megatron_xy.role import Role
from megatron_xy.train_step import train_step


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
    peak: int
    collectives: list[Collective]
    seconds: float


def dry_run(config: RunConfig, *, rank: int, world_size: int, bucket: int) -> list[RankFindings]:
    """A step of `rank` in a job of a checked, complete config, every sample as long as `bucket`."""
    ledger = Ledger(device.current())
    with _rank_of_world(rank, world_size), _compiled_as(ledger), ledger:
        return [_trained(config, rank=rank, bucket=bucket, ledger=ledger)]


def _trained(config: RunConfig, *, rank: int, bucket: int, ledger: Ledger) -> RankFindings:
    """The one role of pretrain, sft or reward."""
    began = time.perf_counter()
    role = pretrain.build(config)
    batches = micro_batches(config, dp_size=role.groups.dp_size, bucket=bucket)
    return note_step(config, role, batches, ledger=ledger, rank=rank, began=began)


def note_step(
    config: RunConfig, role: Role, batches: Sequence[MicroBatch], *, ledger: Ledger, rank: int, began: float
) -> RankFindings:
    """One training step of a fresh role, under an entered `ledger` that has seen it built."""
    before = storage_bytes(_optimizer_tensors(role))
    ledger.traffic.clear()
    ledger.begin_peak()
    peaks: list[int] = []

    def passes_are_done() -> None:
        peaks.append(ledger.peak)
        ledger.begin_peak()

    with role.active():
        train_step(
            role,
            batches,
            num_sources=1,
            lr=config.optimizer.lr,
            clip_grad=config.optimizer.clip_grad,
            objective=reward_objective(config.reward_section) if config.task == "reward" else None,
            before_update=passes_are_done,
        )
    # The moments are made by the first update: every later step's passes have them beside.
    optimizer = storage_bytes(_optimizer_tensors(role))
    peaks = [peaks[0] + optimizer - before, ledger.peak]
    parameters = [named.parameter for named in role.named_parameters()]
    weights = storage_bytes(parameters)
    gradients = storage_bytes(_gradient_buffers(role))
    static = weights + gradients + optimizer
    groups = role.groups
    return RankFindings(
        rank=rank,
        role=role.name,
        tp_rank=groups.tp_rank,
        pp_rank=groups.pp_rank,
        dp_rank=groups.dp_rank,
        num_layers=len({name.split(".")[2] for name in _names(role) if name.startswith("decoder.layers.")}),
        num_micro_batches=len(batches),
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=peaks[0] - static,
        update=peaks[1] - static,
        peak=max(peaks),
        collectives=_collectives(ledger.traffic, groups),
        seconds=time.perf_counter() - began,
    )


def micro_batches(config: RunConfig, *, dp_size: int, bucket: int) -> list[MicroBatch]:
    """A step's micro-batches of one data parallel rank, of samples, or pairs, that fill the bucket."""
    training = config.training
    number = training.global_batch_tokens // (training.micro_batch_tokens * dp_size)
    per_micro_batch = training.micro_batch_tokens // bucket
    if config.task == "reward":
        parallel_config = config.parallel
        return pair_micro_batches(
            [_pair(bucket)] * (number * per_micro_batch),
            source_ids=[0] * (number * per_micro_batch),
            width=training.micro_batch_tokens,
            loss=config.reward_section.loss,
            margin_scale=config.reward_section.margin_scale,
            dp_size=1,
            dp_rank=0,
            multiple=parallel_config.pipeline_model_parallel_size if parallel_config.num_chunks > 1 else 1,
        )
    sample = Sample(tokens=np.ones(bucket, dtype=np.int64), piece_lengths=np.array([bucket]))
    batch = collate(
        [sample] * per_micro_batch,
        source_indices=[0] * per_micro_batch,
        num_sources=1,
        bucket=bucket,
        micro_batch_tokens=training.micro_batch_tokens,
        split_documents=config.data.split_documents,
    )
    return [batch] * number


def _pair(num_tokens: int) -> Pair:
    """Two answers, each with its prompt half of the tokens."""
    prompt = np.ones(num_tokens // 4, dtype=np.int32)
    chosen, rejected = (np.full(num_tokens // 2 - len(prompt), token, dtype=np.int32) for token in (1, 2))
    return Pair("", "", prompt, chosen, rejected, strength=1, source="", models=("", ""))


def first_ranks(config: RunConfig, *, world_size: int) -> list[int]:
    """The first rank of each pipeline stage of a training job."""
    stages = config.parallel.pipeline_model_parallel_size
    return list(range(0, world_size, world_size // stages))


def _optimizer_tensors(role: Role) -> list[torch.Tensor]:
    """What the optimizer holds beside the model's own weights: fp32 main weights, moments, step counters."""
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


def _names(role: Role) -> Iterator[str]:
    return (named.name for named in role.named_parameters())


def _collectives(traffic: Mapping[tuple[str, str], Traffic], groups: Groups) -> list[Collective]:
    """In groups of more than one rank, by the group's short name."""
    collection = groups.collection
    known = {"tp": collection.tp, "dp": collection.dp, "pp": collection.pp, "mp": collection.mp}
    known |= {"embd": collection.embd, "all": groups.all_ranks}
    names: dict[str, tuple[str, int]] = {}
    for name, group in known.items():
        names.setdefault(group.group_name, (name, group.size()))
    return [
        Collective(kind, *names[group], calls=noted.calls, bytes=noted.bytes)
        for (kind, group), noted in sorted(traffic.items())
        if names[group][1] > 1
    ]


@contextlib.contextmanager
def _rank_of_world(rank: int, world_size: int) -> Iterator[None]:
    """Inside, environment and process group say that this process is `rank` of `world_size`."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        with parallel.pretended_world(rank=rank, world_size=world_size):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _compiled_as(ledger: Ledger) -> Iterator[None]:
    """Inside, what torch.compile would make one kernel of is one in the ledger."""
    compile_ = torch.compile
    torch.compile = as_kernels(ledger)
    try:
        yield
    finally:
        torch.compile = compile_
