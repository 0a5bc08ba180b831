"""Logits and log-probabilities of given token rows under any layout: what is compared with other implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_xy.data.dataset import MicroBatch, Sample, collate
from megatron_xy.losses import token_logprobs_and_entropy
from megatron_xy.parallel import gathered_over
from megatron_xy.role import Role
from megatron_xy.training.train_step import forward_pass, on_device

ROWS_A_PASS = 16  # through the pipeline; all are padded to the longest of them
OutputsOf = Callable[[Role, torch.Tensor, torch.Tensor], torch.Tensor]


def logits_of(role: Role, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [row length, vocabulary] fp32 of every row of token ids; an empty list but on the last pipeline stage.

    Of a model with a value head: values [row length, 1]. Each row is a document of its own. Collective over the ranks
    of a replica, which get the same rows.
    """
    return [output[: len(row)] for row, output in zip(rows, _outputs(role, rows, _logits), strict=False)]


def logprobs_of(role: Role, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, log-probabilities [row length - 1] fp32 of the row's tokens from the second on) of every row.

    Likewise. Rows are gone through by their lengths, some at a time.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for first in range(0, len(order), ROWS_A_PASS):
        places = order[first : first + ROWS_A_PASS]
        outputs = _outputs(role, [rows[place] for place in places], _logprobs)
        yield from ((place, output[: len(rows[place]) - 1]) for place, output in zip(places, outputs, strict=False))


@torch.no_grad()
def _outputs(role: Role, rows: Sequence[Sequence[int]], outputs_of: OutputsOf) -> list[torch.Tensor]:
    width = max(len(row) for row in rows)
    width += -width % role.groups.tp_size  # sequence parallelism splits it
    batches = [on_device(_padded(row, width)) for row in rows]
    with role.evaluating():
        outputs = forward_pass(role, batches, lambda batch, last: {"rows": outputs_of(role, last[0], batch.labels[0])})
    return [output["rows"] for output in outputs]


def _logits(role: Role, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if role.model.head == "value":
        return logits.float()
    parts = gathered_over(logits.float(), role.groups.collection.tp)  # [tp, tokens, vocabulary/tp]
    return parts.movedim(0, 1).flatten(1)[:, : role.vocab_size]


def _logprobs(role: Role, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    tp_group = role.groups.collection.tp
    return token_logprobs_and_entropy(logits, labels, vocab_size=role.vocab_size, temperature=1.0, tp_group=tp_group)[0]


def _padded(row: Sequence[int], width: int) -> MicroBatch:
    """One row as a micro-batch: the document, then padding that nothing attends to."""
    sample = Sample(np.array(row, dtype=np.int64), np.array([len(row)]))
    return collate([sample], source_indices=[0], bucket=width, micro_batch_tokens=width, split_documents=True)
