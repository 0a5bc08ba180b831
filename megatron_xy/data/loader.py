"""A data step's micro-batches for one data parallel rank: from the run's config and data, prepared ahead of training.

The batch of a step follows from the sampler alone; which rank gets which sample, from the samples' attention work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_xy.config import RunConfig
from megatron_xy.data.dataset import MicroBatch, PackedDataset, collate, samples_of_rank
from megatron_xy.data.draws.phases import epoch_ends, run_sampler
from megatron_xy.data.prefetcher import Prefetcher


@dataclass(frozen=True)
class PreparedStep:
    """The micro-batches of one data step for this data parallel rank, and what the whole step's batch is."""

    bucket: int  # of its samples; of pairs, which have none, the micro-batch's tokens
    micro_batches: list[MicroBatch]
    num_samples: int  # of all ranks
    num_tokens: int  # of all ranks, the same in every layout: with the samples' padding, without that of their packing
    samples: dict[str, list[int]]  # of all ranks: {source: indices within (source, bucket)}


class StepLoader:
    """Prepares this data parallel rank's micro-batches of any data step, the next ones in the background."""

    def __init__(self, config: RunConfig, *, dataset: PackedDataset, dp_size: int, dp_rank: int) -> None:
        self.sampler = run_sampler(config, dataset.streams)
        self.sources = dataset.sources
        self.data_fingerprints = dataset.fingerprints
        self.chat_template = dataset.chat_template
        self._dataset, self._config = dataset, config
        self._dp_size, self._dp_rank = dp_size, dp_rank
        self._epoch_ends = epoch_ends(config, dataset.streams, conversation_sources=dataset.conversation_sources)
        self._prefetcher = Prefetcher(self._prepare)

    def get(self, data_step: int) -> tuple[PreparedStep, float]:
        """The step's micro-batches and the seconds waited for them."""
        return self._prefetcher.get(data_step)

    def ends_epoch(self, iteration: int) -> bool:
        """Whether an iteration, from 1 on, is the last of its epoch, in a run that counts in epochs."""
        return iteration in self._epoch_ends

    def consumed_shares(self, data_step: int) -> dict[str, float]:
        """{source: its part of the tokens, padding included, of all steps before `data_step`}, from step 1 on."""
        epochs = self.sampler.epochs(data_step)
        drawn = dict.fromkeys(self.sources, 0.0)
        for stream in self._dataset.streams:
            drawn[stream.source] += epochs.get((stream.source, stream.bucket), 0) * stream.num_samples * stream.bucket
        total = sum(drawn.values())
        return {source: tokens / total for source, tokens in drawn.items()}

    def epochs_by_source(self, data_step: int) -> dict[str, dict[str, float]]:
        """{source: {bucket: how often its samples were drawn in all steps before `data_step`}}."""
        epochs: dict[str, dict[str, float]] = {}
        for (source, bucket), times in self.sampler.epochs(data_step).items():
            epochs.setdefault(source, {})[str(bucket)] = times
        return epochs

    def begun_epochs(self, data_step: int) -> list[tuple[str, int, int]]:
        """(source, bucket, number) of every epoch but the first that `data_step` begins: numbers count from 1."""
        before, after = self.sampler.epochs(data_step), self.sampler.epochs(data_step + 1)
        return [
            (source, bucket, math.ceil(times))
            for (source, bucket), times in after.items()
            if math.ceil(times) > max(1, math.ceil(before[source, bucket]))
        ]

    def close(self) -> None:
        """Ends the background thread."""
        self._prefetcher.close()

    def _prepare(self, data_step: int) -> PreparedStep:
        batch, mine = samples_of_rank(
            self._dataset,
            self.sampler,
            data_step,
            data_parallel_size=self._dp_size,
            data_parallel_rank=self._dp_rank,
            split_documents=self._config.data.split_documents,
        )
        micro_batch_tokens = self._config.training.micro_batch_tokens
        per_micro_batch = micro_batch_tokens // batch.bucket
        micro_batches = [
            collate(
                [self._dataset.sample(sample) for sample in mine[first : first + per_micro_batch]],
                source_indices=[self.sources.index(sample.source) for sample in mine[first : first + per_micro_batch]],
                bucket=batch.bucket,
                micro_batch_tokens=micro_batch_tokens,
                split_documents=self._config.data.split_documents,
            )
            for first in range(0, len(mine), per_micro_batch)
        ]
        samples: dict[str, list[int]] = {}
        for source, index in zip(batch.sources, batch.indices, strict=True):
            samples.setdefault(source, []).append(index)
        num_samples = len(batch.indices)
        return PreparedStep(batch.bucket, micro_batches, num_samples, batch.bucket * num_samples, samples)
