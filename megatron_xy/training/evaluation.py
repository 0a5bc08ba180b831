"""Loss on held-out data, by bucket, source and position: every sample once, and no trace of it in the training.

    folder -> rows of one bucket in a fixed order -> forward passes of the role -> sums over ranks -> Evaluation

Sums are kept in fp64, by token: the numbers depend neither on the layout nor on how the data falls into passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_xy import device
from megatron_xy.config import RunConfig
from megatron_xy.data.dataset import MicroBatch, PackedDataset, collate
from megatron_xy.data.draws.sampler import SampleId
from megatron_xy.data.prefetcher import Prefetcher
from megatron_xy.log import RunLog
from megatron_xy.losses import token_cross_entropy
from megatron_xy.parallel import Groups, sum_over
from megatron_xy.role import Role
from megatron_xy.training.train_step import DeviceBatch, forward_pass, on_device

POSITION_RANGES = {"0-2k": 0, "2-4k": 2048, "4-8k": 4096, "8-16k": 8192, "16k-": 16384}  # where each begins
MAX_PERPLEXITY_LOSS = 700.0  # beyond it e to the loss is no finite number


@dataclass(frozen=True)
class HeldOut:
    """Held-out data, and in what portions a data parallel rank goes through it."""

    dataset: PackedDataset
    micro_batch_tokens: int
    split_documents: bool
    micro_batches_per_pass: int

    def rows(self) -> list[tuple[int, list[SampleId]]]:
        """(bucket, samples) of all ranks' micro-batches, bucket by bucket; a bucket's last one may be short."""
        dataset = self.dataset
        rows = []
        for bucket in dataset.buckets:
            streams = [stream for stream in dataset.streams if stream.bucket == bucket]
            ids = [SampleId(stream.source, bucket, index) for stream in streams for index in range(stream.num_samples)]
            size = self.micro_batch_tokens // bucket
            rows += [(bucket, ids[first : first + size]) for first in range(0, len(ids), size)]
        return rows

    def micro_batch(self, bucket: int, samples: Sequence[SampleId]) -> MicroBatch:
        """One row; where it is short, its last sample stands again, without a part in the loss."""
        sources = self.dataset.sources
        size = self.micro_batch_tokens // bucket
        filled = [*samples, *[samples[-1]] * (size - len(samples))]
        batch = collate(
            [self.dataset.sample(sample) for sample in filled],
            source_indices=[sources.index(sample.source) for sample in filled],
            bucket=bucket,
            micro_batch_tokens=self.micro_batch_tokens,
            split_documents=self.split_documents,
        )
        counts = np.arange(self.micro_batch_tokens) < len(samples) * bucket
        return replace(batch, loss_mask=batch.loss_mask * counts.astype(np.float32))


class HeldOutEvaluator:
    """A run's evaluations: every `eval_interval` iterations and after the last one, where there is held-out data."""

    def __init__(self, config: RunConfig, held_out: PackedDataset | None, groups: Groups) -> None:
        training = config.training
        self._train_iters, self._interval = training.train_iters, training.eval_interval
        self._held_out = None
        if held_out is not None:
            self._held_out = HeldOut(
                held_out,
                micro_batch_tokens=training.micro_batch_tokens,
                split_documents=config.data.split_documents,
                micro_batches_per_pass=training.global_batch_tokens // (training.micro_batch_tokens * groups.dp_size),
            )

    def is_due(self, iteration: int) -> bool:
        """Whether one follows on this iteration."""
        return self._held_out is not None and (iteration % self._interval == 0 or iteration == self._train_iters)

    def evaluate(self, role: Role, *, iteration: int, goes_on: Callable[[], bool]) -> dict[str, Any] | None:
        """Its record; None where `goes_on` said no."""
        assert self._held_out is not None, "only then is an evaluation due"
        losses = evaluate(role, self._held_out, goes_on=goes_on)
        return None if losses is None else {"iteration": iteration, **losses}

    def tell(self, log: RunLog, record: dict[str, Any], *, seconds: float) -> None:
        """Logs a record."""
        log.evaluation(record, seconds=seconds)


@torch.no_grad()
def evaluate(role: Role, held_out: HeldOut, *, goes_on: Callable[[], bool]) -> dict[str, Any] | None:
    """The role's mean losses over all its unmasked tokens, as eval.jsonl has them; None where `goes_on`, asked before
    every pass, said no. Collective over the role.

    Weights, gradients and moments stay as they are. The numbers are the whole's on the last stage.
    """
    rows, groups = held_out.rows(), role.groups
    buckets, num_sources = held_out.dataset.buckets, len(held_out.dataset.sources)
    num_ranges = len(POSITION_RANGES)
    totals = torch.zeros(len(buckets), num_sources * num_ranges, 2, dtype=torch.float64, device=device.current())
    # Ranks take rows in turn. Where rows do not come out even, the last one is run again and counts nothing.
    end = len(rows) + -len(rows) % groups.dp_size
    mine = [(row, row < len(rows)) for row in range(groups.dp_rank, end, groups.dp_size)]
    size = held_out.micro_batches_per_pass
    passes = [mine[first : first + size] for first in range(0, len(mine), size)]

    def prepare(number: int) -> list[MicroBatch]:
        if number >= len(passes):
            return []
        return [held_out.micro_batch(*rows[min(row, len(rows) - 1)]) for row, _ in passes[number]]

    with Prefetcher(prepare, depth=1) as prefetcher, role.evaluating():
        for number, part in enumerate(passes):
            if not goes_on():
                return None
            batches = [on_device(batch) for batch in prefetcher.get(number)[0]]
            outputs = forward_pass(role, batches, partial(_held_out_sums, role, num_sources))
            for (row, counts), output in zip(part, outputs, strict=False):  # none but on the last stage
                if counts:
                    totals[buckets.index(rows[row][0])] += output["totals"]
    sum_over(totals, groups.collection.dp)
    return _losses(totals.reshape(len(buckets), num_sources, num_ranges, 2).cpu().numpy(), held_out)


def _held_out_sums(role: Role, num_sources: int, batch: DeviceBatch, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """{totals [sources x ranges of positions, 2]: sums of losses and counts, fp64}."""
    losses = token_cross_entropy(logits, batch.labels, vocab_size=role.vocab_size, tp_group=role.groups.collection.tp)
    positions = batch.packed.position_ids
    assert positions is not None, "on_device sets them"
    begins = torch.tensor(list(POSITION_RANGES.values()), device=losses.device)
    cells = batch.source_ids * len(begins) + torch.bucketize(positions, begins, right=True) - 1
    pairs = torch.stack([(losses * batch.loss_mask)[0], batch.loss_mask[0]], dim=1).to(torch.float64)
    totals = torch.zeros(num_sources * len(begins), 2, dtype=torch.float64, device=losses.device)
    return {"totals": totals.index_add_(0, cells, pairs)}


def _losses(totals: np.ndarray[Any, np.dtype[np.float64]], held_out: HeldOut) -> dict[str, Any]:
    """From totals [buckets, sources, ranges, 2]. A bucket, source or range of positions without any token is left out;
    a position restarts where documents are split."""

    def means(axes: tuple[int, int], names: Sequence[Any]) -> dict[Any, float]:
        pairs = totals.sum(axis=axes)
        return {name: float(total / count) for name, (total, count) in zip(names, pairs, strict=True) if count}

    total, count = totals.sum(axis=(0, 1, 2))
    loss = float(total / max(count, 1.0))
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, MAX_PERPLEXITY_LOSS)),
        "num_loss_tokens": int(count),
        "loss_by_bucket": means((1, 2), list(map(str, held_out.dataset.buckets))),
        "loss_by_source": means((0, 2), held_out.dataset.sources),
        "loss_by_position": means((0, 1), list(POSITION_RANGES)),
    }
