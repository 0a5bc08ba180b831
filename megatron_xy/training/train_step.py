"""One optimizer step of a role: micro-batches through megatron-core's schedule, the update, the step's numbers.

The loss is the sum over all tokens (or pairs, as the objective counts) of the global batch divided by their number: the
result depends neither on how the batch is split into micro-batches nor over data parallel ranks nor on its bucket.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch

from megatron_xy import device, mcore
from megatron_xy.data.dataset import MicroBatch, PairIndex
from megatron_xy.losses import token_cross_entropy
from megatron_xy.model.rotary import PackedDocuments
from megatron_xy.optimizer import apply_gradients, finish_gradients
from megatron_xy.parallel import from_last_stage, sum_over
from megatron_xy.role import Role


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch on the device: a row of `micro_batch_tokens` tokens."""

    tokens: torch.Tensor  # [1, tokens] int64
    labels: torch.Tensor  # [1, tokens] int64
    loss_mask: torch.Tensor  # [1, tokens] fp32
    source_ids: torch.Tensor  # [tokens] int64
    packed: PackedDocuments
    pairs: PairIndex[torch.Tensor] | None = None


BatchType = TypeVar("BatchType", bound=DeviceBatch)
# Of a micro-batch: the sum of its losses, their number (int32), by which megatron-core divides the gradients after it
# has added up that of all micro-batches and data parallel ranks, and what else is to be known.
BatchLoss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
Judge = Callable[[float, float], bool]


@dataclass(frozen=True)
class Objective:
    """What a task learns.

    loss: of the role, the number of sources, a micro-batch and the last stage's output; tells {totals [sources, 2 +
    measures] fp64}: by source the sum of losses, their number, and the sums of the measures.
    measures: names of what is told beside the loss, each a mean over what the loss counts.
    """

    loss: Callable[[Role, int, DeviceBatch, torch.Tensor], BatchLoss]
    measures: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank of the role."""

    loss: float  # mean over the global batch's unmasked tokens, or what else the objective counts; nan of none
    num_loss_tokens: int  # unmasked ones, or pairs, as the objective counts
    source_losses: dict[int, float]  # by source index, for the sources drawn
    source_tokens: dict[int, int]  # as num_loss_tokens, likewise
    grad_norm: float
    updated: bool
    forward_backward_seconds: float  # until the gradient norm is known
    measures: dict[str, float]  # the objective's


def train_step(
    role: Role,
    micro_batches: Sequence[MicroBatch],
    *,
    num_sources: int,
    lr: float,
    clip_grad: float,
    train_only: Collection[str] | None = None,
    objective: Objective | None = None,
    judge: Judge | None = None,
    before_update: Callable[[], object] = lambda: None,
) -> StepResult:
    """One update of the role's weights from this data parallel rank's micro-batches; collective over the role.

    train_only: parts of the model ("embedding", "output_layer"); the rest stays as it is. None: everything trains.
    objective: next-token prediction unless given.
    judge: of the step's loss and its finite gradient norm, whether the update is made; the same answer on all ranks.
    before_update: called right before weights and moments change.
    """
    began = time.perf_counter()
    objective = objective or Objective(language_model_loss)
    assert role.optimizer is not None, "a role that trains has an optimizer"
    role.zero_gradients()
    batches = [on_device(batch) for batch in micro_batches]
    outputs = forward_backward(role, batches, loss_of=partial(objective.loss, role, num_sources))
    columns = 2 + len(objective.measures)
    totals = torch.zeros(num_sources, columns, dtype=torch.float64, device=device.current())
    for output in outputs:
        totals += output["totals"]
    totals = from_last_stage(sum_over(totals, role.groups.collection.dp), role.groups)
    grad_norm = finish_gradients(role.optimizer, frozen=[] if train_only is None else role.frozen(train_only))
    forward_backward_seconds = time.perf_counter() - began  # all ranks have met, and the device has caught up
    by_source = totals.tolist()
    sums = [sum(column) for column in zip(*by_source, strict=True)]
    num_counted = int(sums[1])
    loss = sums[0] / num_counted if num_counted else math.nan
    updated = math.isfinite(grad_norm) and (judge is None or judge(loss, grad_norm))
    if updated:
        before_update()
        apply_gradients(role.optimizer, lr=lr, clip_grad=clip_grad, grad_norm=grad_norm)
    return StepResult(
        loss=loss,
        num_loss_tokens=num_counted,
        source_losses={index: row[0] / row[1] for index, row in enumerate(by_source) if row[1]},
        source_tokens={index: int(row[1]) for index, row in enumerate(by_source) if row[1]},
        grad_norm=grad_norm,
        updated=updated,
        forward_backward_seconds=forward_backward_seconds,
        measures={name: total / max(num_counted, 1) for name, total in zip(objective.measures, sums[2:], strict=True)},
    )


def forward_backward(
    role: Role,
    batches: Sequence[BatchType],
    *,
    loss_of: Callable[[BatchType, torch.Tensor], BatchLoss],
    forward_only: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """The micro-batches through megatron-core's schedule; gradients end reduced and divided by the global number of
    losses. All micro-batches are of one length.

    loss_of: of a micro-batch and the last stage's output. Returns what it told of each one on the last stage; an empty
    list on the others.
    """

    def forward_step(
        remaining: Iterator[BatchType], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], BatchLoss]]:
        batch = next(remaining)
        return forward(module, batch), partial(loss_of, batch)

    groups, num_chunks = role.groups, len(role.chunks)
    config: Any = role.chunks[0].config
    config.finalize_model_grads_func = partial(mcore.finalize_model_grads, pg_collection=groups.collection)
    schedule = mcore.get_forward_backward_func(pp_size=groups.pp_size, vp_size=num_chunks if num_chunks > 1 else None)
    pipeline: dict[str, Any] = {}
    if groups.pp_size > 1:
        pipeline["p2p_communicator"] = mcore.P2PCommunicator(groups.collection.pp, config)
    num_wanted = len(batches)
    if num_chunks > 1:  # in rounds of as many micro-batches as there are stages
        assert forward_only or num_wanted % groups.pp_size == 0, "who trains plans whole rounds"
        batches = [*batches, *[batches[-1]] * (-num_wanted % groups.pp_size)]
    outputs: list[dict[str, torch.Tensor]] = schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in role.chunks] if num_chunks > 1 else iter(batches),
        model=role.chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1),
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=groups.collection,
        **pipeline,
    )
    return outputs[:num_wanted]


def forward_pass(
    role: Role,
    batches: Sequence[BatchType],
    outputs_of: Callable[[BatchType, torch.Tensor], dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    """What `outputs_of` makes of each micro-batch and the last stage's output; an empty list on the other stages."""

    def no_loss(batch: BatchType, last: torch.Tensor) -> BatchLoss:
        one = torch.ones((), dtype=torch.int, device=last.device)
        return torch.zeros((), device=last.device), one, outputs_of(batch, last)

    return forward_backward(role, batches, loss_of=no_loss, forward_only=True)


def forward(module: torch.nn.Module, batch: DeviceBatch) -> torch.Tensor:
    """Hidden states [tokens, 1, hidden] between stages; logits [1, tokens, padded vocabulary/tp] from the last."""
    output: torch.Tensor = module(batch.tokens, batch.packed.position_ids, None, packed_seq_params=batch.packed)
    return output


def language_model_loss(role: Role, num_sources: int, batch: DeviceBatch, logits: torch.Tensor) -> BatchLoss:
    """Next-token prediction, as an Objective's loss: of the tokens that the mask counts."""
    losses = token_cross_entropy(logits, batch.labels, vocab_size=role.vocab_size, tp_group=role.groups.collection.tp)
    masked = losses * batch.loss_mask
    by_source = torch.nn.functional.one_hot(batch.source_ids, num_sources).to(torch.float64)  # [tokens, sources]
    told = torch.stack([masked.detach()[0], batch.loss_mask[0]], dim=1).to(torch.float64)  # [tokens, 2]
    return masked.sum(), batch.loss_mask.sum().to(torch.int), {"totals": by_source.T @ told}


def on_device(batch: MicroBatch) -> DeviceBatch:
    """A collated micro-batch as tensors on this process's device."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    packed = PackedDocuments.of(lengths, position_ids=device.moved_here(batch.position_ids))
    pairs = None
    if batch.pairs is not None:
        names = [part.name for part in fields(batch.pairs)]
        pairs = PairIndex(**{name: device.moved_here(getattr(batch.pairs, name)) for name in names})
    return DeviceBatch(
        tokens=device.moved_here(batch.tokens)[None],
        labels=device.moved_here(batch.labels)[None],
        loss_mask=device.moved_here(batch.loss_mask)[None],
        source_ids=device.moved_here(batch.source_ids).to(torch.int64),
        packed=packed,
        pairs=pairs,
    )
