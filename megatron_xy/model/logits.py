"""Logits of given token rows under any layout: what is compared with other implementations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from megatron_xy.data.dataset import MicroBatch
from megatron_xy.parallel import joined_over
from megatron_xy.role import Role
from megatron_xy.train_step import DeviceBatch, LossFunction, forward, forward_backward, on_device


@torch.no_grad()
def logits_of(role: Role, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [row length, vocabulary] fp32 of every row of token ids; an empty list but on the last pipeline stage.

    Of a model with a value head: values [row length, 1].

    Each row is a document of its own. Collective over the role's ranks.
    """
    tp_size = role.groups.tp_size
    width = max(len(row) for row in rows)
    width += -width % tp_size  # sequence parallelism splits it
    batches = [on_device(_padded(row, width)) for row in rows]
    for chunk in role.chunks:
        chunk.eval()
    with role.active():
        outputs = forward_backward(role, batches, forward_step=partial(_logits_step, role), forward_only=True)
    for chunk in role.chunks:
        chunk.train()
    return [output["logits"][: len(row)] for output, row in zip(outputs, rows, strict=False)]


def _logits_step(
    role: Role, batches: Iterator[DeviceBatch], module: torch.nn.Module
) -> tuple[torch.Tensor, LossFunction]:
    output = forward(module, next(batches))

    def collect(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        whole = logits[0].float()
        if role.model.head == "language_model":
            whole = joined_over(whole, role.groups.collection.tp)[:, : role.model.vocab_size]
        return logits.sum(), torch.tensor(1, dtype=torch.int), {"logits": whole}

    return output, collect


def _padded(row: Sequence[int], width: int) -> MicroBatch:
    """One row as a micro-batch: the document, then padding that nothing attends to."""
    length = len(row)
    borders = [0, length] if length == width else [0, length, width]
    tokens = np.zeros(width, dtype=np.int64)
    tokens[:length] = row
    return MicroBatch(
        tokens=tokens,
        labels=np.zeros(width, dtype=np.int64),
        loss_mask=np.zeros(width, dtype=np.float32),
        position_ids=np.concatenate([np.arange(length), np.arange(width - length)]),
        cu_seqlens=np.array(borders, dtype=np.int32),
        max_seqlen=max(length, width - length),
        source_ids=np.zeros(width, dtype=np.int32),
        num_padding_tokens=width - length,
        sum_squared_lengths=length**2,
    )
